"""Evolution strategies as in the Fiber paper: a population of 2,048 for 50 generations.

    master ── (parameters, seed) ─► workers: perturb, simulate, return the fitness ──┐
           ◄─ a step along the noise, weighted by the ranks of the fitness ──────────┘

The simulator is a stand-in: it sleeps for 2.5 to 7.5 ms, as long as its seed says, so that a
machine of two cores can have hundreds of them; and it computes a small function. All is plain
Python, so that the rows say something about the pool and nothing about numpy.
"""

from __future__ import annotations

import random
import time

from benchmarks import tasks
from benchmarks.measure import FEW, QUICK, clock, gather, processor_time

TYPE_CHECKING = False  # see peers
if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.measure import Adapter, Figures
    from benchmarks.peers import Peer

POPULATION = 2048
GENERATIONS = 50
FEWEST = 3  # generations, of which the rest is extrapolated
SIZE = 16  # parameters
NOISE = 4099  # numbers in the table
SIGMA, STEP = 0.1, 0.05
SHORTEST, LONGEST = 0.0025, 0.0075  # seconds of a simulation
CHECKED = 16  # results of a generation
GOAL = [0.5 * (-1) ** i for i in range(SIZE)]

_noise: list[float] = []


def noise(seed: int) -> list[float]:
    """The perturbation of a seed, out of a table that all processes make alike."""
    if not _noise:
        source = random.Random(7)
        _noise.extend(source.gauss(0, 1) for _ in range(NOISE))
    start = seed * 7919 % (NOISE - SIZE)
    return _noise[start : start + SIZE]


def duration(seed: int) -> float:
    """How long the simulation of a seed takes, s."""
    return SHORTEST + (LONGEST - SHORTEST) * (seed * 2654435761 % 4096) / 4096


def evaluate(item: tuple[list[float], int]) -> float:
    """The fitness of the parameters, perturbed as the seed says."""
    parameters, seed = item
    time.sleep(duration(seed))
    return fitness_of(parameters, seed)


def fitness_of(parameters: list[float], seed: int) -> float:
    """What the simulation comes to."""
    perturbed = zip(parameters, noise(seed), GOAL, strict=True)
    return -float(sum((p + SIGMA * e - g) ** 2 for p, e, g in perturbed))


def meet(paths: tuple[str, str]) -> int:
    """As `tasks.meet`; then the worker has loaded this module and made the table."""
    noise(0)
    return tasks.meet(paths)


class Strategy:
    """The master's side of it."""

    def __init__(self, population: int) -> None:
        self.population = population
        self.parameters = [0.0] * SIZE
        self.seeds = 0

    def generation(self, peer: Peer) -> float:
        """Do one generation; return the time that its simulations take together."""
        seeds = range(self.seeds, self.seeds + self.population)
        self.seeds += self.population
        fitness = peer.map(evaluate, [(self.parameters, seed) for seed in seeds], chunksize=1)
        for index in range(0, self.population, max(1, self.population // CHECKED)):
            if fitness[index] != fitness_of(self.parameters, seeds[index]):
                raise RuntimeError(f"the fitness of seed {seeds[index]} is not what it should be")
        order = sorted(range(self.population), key=fitness.__getitem__)
        gradient = [0.0] * SIZE
        for rank, index in enumerate(order):
            weight = rank / (self.population - 1) - 0.5
            for i, e in enumerate(noise(seeds[index])):
                gradient[i] += weight * e
        step = STEP * 12 / self.population / SIGMA  # 1 / 12 is the variance of the weights
        self.parameters = [p + step * g for p, g in zip(self.parameters, gradient, strict=True)]
        return sum(map(duration, seeds))


def evolution(case: str, adapter: Adapter, seconds: float) -> Figures:
    """The time of 50 generations with as many workers as `case` says, s; and the master's share.

    With few workers the time is that of the first generations, as many as fit into `seconds`.
    """
    assert adapter is not None
    quick = seconds <= QUICK
    workers = min(int(case), FEW) if quick else int(case)
    strategy = Strategy(POPULATION if not quick else 16)
    with adapter(workers) as peer:
        gather(peer, workers, meet)
        cpu, start, alone, done = processor_time(), clock(), 0.0, 0
        while done < FEWEST or (done < GENERATIONS and clock() - start < seconds):
            alone += strategy.generation(peer)
            done += 1
        took = clock() - start
        share = (processor_time() - cpu) / done * GENERATIONS
        yield case, took / done * GENERATIONS
        yield f"{case}-ideal", took / (alone / workers)
        yield f"{case}-cpu", share


MEASURES: dict[str, Callable[[str, Adapter, float], Figures]] = {"evolution": evolution}
