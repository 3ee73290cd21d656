"""dynesty finds the same evidence with a pool as alone."""

import dynesty
import numpy as np

import fiber


def log_likelihood(x):
    return -0.5 * float(np.sum((x / 0.3) ** 2)) - 2 * np.log(0.3 * np.sqrt(2 * np.pi))


def prior(u):
    return 4 * u - 2


def evidence(**pool):
    sampler = dynesty.NestedSampler(
        log_likelihood, prior, 2, nlive=50, rstate=np.random.default_rng(1), **pool
    )
    sampler.run_nested(dlogz=0.5, print_progress=False)
    return sampler.results.logz[-1]


if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        found = evidence(pool=pool, queue_size=2)
    print("evidence:", abs(found - np.log(1 / 16)) < 0.6)
