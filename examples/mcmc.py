"""Weigh an unseen planet with emcee, whose walkers ask a Fiber pool for their likelihoods.

A planet makes its star wobble, and the star's speed along our line of sight follows Kepler's
equation. The observations are made here, with a fixed seed and a known truth. emcee samples the
orbits that explain them. It takes a `pool=` made for multiprocessing and calls its `map`; Fiber's
fits in as it is.

    python examples/mcmc.py
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import emcee
import numpy as np
from numpy.typing import NDArray

import fiber

Vector = NDArray[np.float64]

#        name, unit, truth, width of the ball in which the walkers start
PARAMETERS = (
    ("period", "d", 14.65, 0.005),
    ("amplitude", "m/s", 52.0, 1.0),
    ("eccentricity", "", 0.32, 0.02),
    ("periastron", "rad", 1.10, 0.05),
    ("phase", "rad", 0.70, 0.05),
    ("offset", "m/s", -5.0, 0.5),
)
TRUTH = np.array([truth for _, _, truth, _ in PARAMETERS])
WIDTH = np.array([width for _, _, _, width in PARAMETERS])
DAYS = 200.0  # how long the star was observed
ERROR = 8.0  # m/s, of one observation


def velocity(orbit: Vector, times: Vector) -> Vector:
    """The star's speed along our line of sight, in m/s, at these times."""
    period, amplitude, eccentricity, periastron, phase, offset = orbit
    mean_anomaly = 2 * np.pi * times / period + phase
    anomaly = mean_anomaly + eccentricity * np.sin(mean_anomaly)
    for _ in range(6):  # Newton's method on Kepler's equation
        excess = anomaly - eccentricity * np.sin(anomaly) - mean_anomaly
        anomaly = anomaly - excess / (1 - eccentricity * np.cos(anomaly))
    true_anomaly = 2 * np.arctan2(
        np.sqrt(1 + eccentricity) * np.sin(anomaly / 2),
        np.sqrt(1 - eccentricity) * np.cos(anomaly / 2),
    )
    wobble = np.cos(true_anomaly + periastron) + eccentricity * np.cos(periastron)
    return np.asarray(amplitude * wobble + offset)


@cache
def observations(seed: int, number: int) -> tuple[Vector, Vector]:
    """Times and measured speeds; each process makes the same ones, once."""
    random = np.random.default_rng(seed)
    times = np.sort(random.uniform(0, DAYS, number))
    return times, velocity(TRUTH, times) + ERROR * random.standard_normal(number)


def log_probability(orbit: Vector, seed: int, number: int) -> float:
    """How well an orbit explains the observations; flat priors within what is an orbit."""
    period, amplitude, eccentricity, *_ = orbit
    if period <= 0 or amplitude <= 0 or not 0 <= eccentricity < 0.95:
        return -np.inf
    times, measured = observations(seed, number)
    return -0.5 * float(np.sum(((measured - velocity(orbit, times)) / ERROR) ** 2))


def sample(options: argparse.Namespace, steps: int, pool: Any = None) -> tuple[Any, float]:
    """Let the walkers walk, here or in the pool; return the sampler and the seconds it took."""
    random = np.random.RandomState(options.seed)  # what emcee uses
    start = TRUTH + WIDTH * random.standard_normal((options.walkers, len(TRUTH)))
    work = partial(log_probability, seed=options.seed, number=options.observations)
    sampler = emcee.EnsembleSampler(options.walkers, len(TRUTH), work, pool=pool)
    sampler.random_state = random.get_state()
    started = time.perf_counter()
    sampler.run_mcmc(start, steps)
    return sampler, time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Sample, compare the posterior with the truth, and the pool with a single process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="default: %(default)s")
    parser.add_argument("--walkers", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--observations", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--processes", type=int, help="default: one for each CPU")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same chain")
    options = parser.parse_args(argv)
    load = os.getloadavg()[0]  # what other programs are doing, before this one adds to it
    options.processes = options.processes or fiber.cpu_count()
    if options.steps < 10 or options.walkers < 2 * len(TRUTH):
        parser.error(f"--steps must be at least 10 and --walkers at least {2 * len(TRUTH)}.")

    print(
        f"{options.walkers} walkers, {options.steps} steps, {options.observations} observations, "
        f"{options.processes} processes"
    )
    few = max(10, options.steps // 5)
    with fiber.Pool(options.processes) as pool:
        sampler, _ = sample(options, options.steps, pool)
        in_pool, together = sample(options, few, pool)
    in_one, alone = sample(options, few)

    posterior = sampler.get_chain(discard=options.steps // 3, flat=True)
    middle, spread = posterior.mean(axis=0), posterior.std(axis=0)
    print(f"acceptance {sampler.acceptance_fraction.mean():.2f}\n")
    print("                      truth    posterior            off by")
    for (name, unit, truth, _), mean, sd in zip(PARAMETERS, middle, spread, strict=True):
        off = (mean - truth) / sd
        print(f"{name:<13}{unit:<4}{truth:10.4f}   {mean:10.4f} ± {sd:.4f}   {off:+.1f} sd")

    if not np.array_equal(in_pool.get_chain(), in_one.get_chain()):
        print("The pool and one process walked different chains.", file=sys.stderr)
        return 1
    calls = few * options.walkers
    print(
        f"\nSpeed-up: {alone / together:.2f}x with {options.processes} processes on "
        f"{fiber.cpu_count()} CPUs (load before the start: {load:.1f})\n  {calls} likelihoods of "
        f"{1000 * alone / calls:.2f} ms: {alone:.2f} s in one process, {together:.2f} s in the "
        "pool, the same chain"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
