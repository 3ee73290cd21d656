"""emcee walks the same chain in a pool as alone."""

import emcee
import numpy as np

import fiber


def log_prob(x, means, precision):
    off = x - means
    return -0.5 * off @ precision @ off


MEANS = np.array([1.0, -2.0, 3.0])
PRECISION = np.diag([1.0, 4.0, 0.25])
START = np.random.default_rng(0).standard_normal((16, 3))


def walk(pool=None):
    np.random.seed(1)
    sampler = emcee.EnsembleSampler(16, 3, log_prob, args=(MEANS, PRECISION), pool=pool)
    sampler.run_mcmc(START, 200)
    return sampler.get_chain()


if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        chain = walk(pool=pool)
    print("same chain:", np.array_equal(chain, walk()))
    print("means:", *chain[100:].mean(axis=(0, 1)).round(2))
