"""SciPy's optimizers and integrators take a pool's map as `workers`."""

import numpy as np
from scipy import integrate, optimize

import fiber


def bowl(x):
    return (x[0] - 1) ** 2 + (x[1] + 2) ** 2


def moved(x, by):
    return bowl(x - by)


def wave(x):
    return np.array([np.sin(x), np.cos(x)])


BOUNDS = [(-5, 5), (-5, 5)]

if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        found = optimize.differential_evolution(
            moved, BOUNDS, args=(1.0,), seed=1, workers=pool.map, updating="deferred"
        )
        alone = optimize.differential_evolution(
            moved, BOUNDS, args=(1.0,), seed=1, updating="deferred"
        )
        print("differential_evolution:", *found.x.round(3), np.array_equal(found.x, alone.x))

        best = optimize.brute(bowl, BOUNDS, Ns=11, workers=pool.map)
        print("brute:", *best.round(3), np.array_equal(best, optimize.brute(bowl, BOUNDS, Ns=11)))

        area, _ = integrate.quad_vec(wave, 0, np.pi / 2, workers=pool.map)
        print("quad_vec:", *area.round(6))
