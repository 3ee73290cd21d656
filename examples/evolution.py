"""Evolution strategies on a control task: a small neural network learns to act without gradients.

Every generation scatters a population around the current policy, plays one episode with each
candidate in a Pool, and moves the policy towards the noise that earned more:

    policy ──► candidates (policy ± noise) ──► pool.map(play) ──► rewards ──► ranks ──► Adam
       ▲                                                                                  │
       └──────────────────────────────────────────────────────────────────────────────────┘

A candidate travels as a few integers, the seed of its noise, and its reward comes back as one
float: master and workers draw the same noise from the same seed. The method is OpenAI's (Salimans
et al., 2017, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning").

    python examples/evolution.py
    python examples/evolution.py --env CartPole-v1 --generations 20 --population 128
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import fiber

Vector = NDArray[np.float64]
Key = tuple[int, ...]  # the integers that seed a random generator
Candidate = tuple[Key, int]  # whose noise, and whether it is added (1) or subtracted (-1)

HIDDEN = 16  # neurons in the one hidden layer
SIGMA = 0.3  # how far candidates scatter around the policy
LEARNING_RATE = 0.15
FRESH_EPISODES = 100  # episodes nobody trained on, for the verdict
ENOUGH_SECONDS = 2.0  # of work in one process, to compare the pool with


# ── What the workers do ──────────────────────────────────────────────────────────────────────────


@cache
def environment(env_id: str) -> gym.Env[Any, Any]:
    """The task's environment, made once in each process."""
    return gym.make(env_id)


@cache
def shapes(env_id: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of the network's two layers; the extra row of each is its bias."""
    env = environment(env_id)
    inputs = gym.spaces.flatdim(env.observation_space)
    outputs = gym.spaces.flatdim(env.action_space)
    return (inputs + 1, HIDDEN), (HIDDEN + 1, outputs)


def play(env_id: str, theta: Vector, key: Key) -> float:
    """Play one episode with the policy `theta` and return what it earned."""
    env = environment(env_id)
    first, second = shapes(env_id)
    split = first[0] * first[1]
    w1, w2 = theta[:split].reshape(first), theta[split:].reshape(second)

    observation, _ = env.reset(seed=int(np.random.default_rng(key).integers(2**31)))
    total, done = 0.0, False
    while not done:
        hidden = np.tanh(observation @ w1[:-1] + w1[-1])
        output = hidden @ w2[:-1] + w2[-1]
        observation, reward, terminated, truncated, _ = env.step(to_action(env, output))
        total += float(reward)
        done = terminated or truncated
    return total


def to_action(env: gym.Env[Any, Any], output: Vector) -> Any:
    """The network's output as an action: the largest of a choice, or a point between the bounds."""
    space = env.action_space
    if isinstance(space, gym.spaces.Box):
        middle, reach = (space.high + space.low) / 2, (space.high - space.low) / 2
        return (middle + reach * np.tanh(output)).astype(space.dtype)
    return int(np.argmax(output))


def noise(size: int, key: Key) -> Vector:
    """The noise of a pair of candidates; the same key gives the same noise in every process."""
    return np.random.default_rng(key).standard_normal(size)


def play_candidate(env_id: str, theta: Vector, candidate: Candidate) -> float:
    """Play one episode with the policy moved by its noise: what a worker does for one task."""
    key, sign = candidate
    return play(env_id, theta + sign * SIGMA * noise(theta.size, key), key)


# ── What the master does ─────────────────────────────────────────────────────────────────────────


def candidates(seed: int, generation: int, population: int) -> list[Candidate]:
    """Antithetic pairs: each noise once added and once subtracted, both on the same episode."""
    return [((seed, generation, i // 2), 1 if i % 2 == 0 else -1) for i in range(population)]


def centred_ranks(rewards: Vector) -> Vector:
    """Replace rewards by their ranks, from -0.5 to 0.5, so that no outlier pulls the policy away.

    Equal rewards share their mean rank: where nobody has learned anything yet, nothing moves.
    """
    _, group, size = np.unique(rewards, return_inverse=True, return_counts=True)
    rank = np.cumsum(size) - (size + 1) / 2
    return np.asarray(rank[group] / (len(rewards) - 1) - 0.5)


class Adam:
    """Gradient ascent with a step size of its own for each weight (Kingma and Ba, 2014)."""

    def __init__(self, size: int) -> None:
        self.mean, self.square, self.steps = np.zeros(size), np.zeros(size), 0

    def step(self, gradient: Vector) -> Vector:
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.99 * self.square + 0.01 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.99**self.steps)
        return np.asarray(LEARNING_RATE * mean / (np.sqrt(square) + 1e-8))


def initial_policy(env_id: str, seed: int) -> Vector:
    """Small random weights."""
    size = sum(rows * columns for rows, columns in shapes(env_id))
    return 0.1 * np.random.default_rng(seed).standard_normal(size)


def train(pool: Any, options: argparse.Namespace) -> tuple[Vector, Vector]:
    """Evolve the policy; return it, and the rewards of each generation's population."""
    theta = initial_policy(options.env, options.seed)
    adam = Adam(theta.size)
    history = []
    print("generation      mean      best   episodes/s")
    for generation in range(1, options.generations + 1):
        started = time.perf_counter()
        population = candidates(options.seed, generation, options.population)
        rewards = np.array(pool.map(partial(play_candidate, options.env, theta), population))

        gradient = np.zeros(theta.size)
        for (key, sign), rank in zip(population, centred_ranks(rewards), strict=True):
            gradient += rank * sign * noise(theta.size, key)
        theta = theta + adam.step(gradient / (options.population * SIGMA))

        rate = options.population / (time.perf_counter() - started)
        history.append(rewards)
        print(
            f"{generation:10} {rewards.mean():9.1f} {rewards.max():9.1f} {rate:12.1f}", flush=True
        )
    return theta, np.array(history)


def fresh_rewards(pool: Any, env_id: str, theta: Vector, seed: int) -> Vector:
    """What a policy earns in episodes it was not trained on (training begins at generation 1)."""
    keys = [(seed, 0, i) for i in range(FRESH_EPISODES)]
    return np.array(pool.map(partial(play, env_id, theta), keys))


def time_both_ways(pool: Any, options: argparse.Namespace) -> tuple[int, float, float]:
    """Play whole generations in this process alone and in the pool: episodes, seconds, seconds.

    Same episodes, same policy, both ways warm; they take turns until there is enough to compare, so
    that the load of other programs on this machine falls on both.
    """
    work = partial(play_candidate, options.env, initial_policy(options.env, options.seed))
    work(((options.seed, 0, 0), 1))  # this process has not played yet: it makes its environment
    episodes, alone, together = 0, 0.0, 0.0
    for generation in count(1):
        population = candidates(options.seed, generation, options.population)
        started = time.perf_counter()
        rewards_alone = list(map(work, population))
        between = time.perf_counter()
        rewards_together = pool.map(work, population)
        together += time.perf_counter() - between
        alone += between - started
        episodes += len(population)
        if rewards_alone != rewards_together:
            raise SystemExit("The pool and one process played the same episodes differently.")
        if alone > ENOUGH_SECONDS:
            break
    return episodes, alone, together


# ── What the user sees ───────────────────────────────────────────────────────────────────────────


def plot(
    path: Path, env_id: str, history: Vector, before: float, after: Vector, solved: float | None
) -> None:
    """Save the learning curve as a PNG."""
    from matplotlib.figure import Figure  # here, since only the master draws

    generations = np.arange(1, len(history) + 1)
    low, high = np.percentile(history, [10, 90], axis=1)
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.fill_between(
        generations, low, high, color="#4c78a8", alpha=0.2, lw=0, label="10th to 90th percentile"
    )
    axes.plot(generations, history.max(axis=1), color="#f58518", lw=1.2, label="best candidate")
    axes.plot(
        generations, history.mean(axis=1), color="#4c78a8", lw=2.2, label="mean of population"
    )
    axes.errorbar(
        len(history) + 1,
        after.mean(),
        yerr=after.std(),
        fmt="D",
        color="#222222",
        ms=6,
        capsize=3,
        label=f"learned policy, {len(after)} fresh episodes (mean ± sd)",
    )
    if solved is not None:
        axes.axhline(solved, color="#54a24b", ls="--", lw=1.4, label=f"solved ({solved:g})")
    axes.axhline(before, color="#888888", ls=":", lw=1.4, label=f"untrained ({before:.0f})")
    axes.set_xlim(1, len(history) + 1.5)
    axes.set_xlabel("generation")
    axes.set_ylabel("reward of an episode")
    axes.set_title(f"Evolution strategies learn {env_id}", loc="left", weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--env", default="Acrobot-v1", help="a Gymnasium task (default: %(default)s)"
    )
    parser.add_argument("--generations", type=int, default=30, help="default: %(default)s")
    parser.add_argument(
        "--population",
        type=int,
        default=96,
        help="candidates, an even number (default: %(default)s)",
    )
    parser.add_argument("--processes", type=int, help="default: one for each CPU")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same run")
    parser.add_argument(
        "--output", type=Path, default=Path("evolution.png"), help="the plot (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    options.processes = options.processes or fiber.cpu_count()
    if options.population < 2 or options.population % 2 or options.generations < 1:
        parser.error("--population must be even and at least 2, --generations at least 1.")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Train, judge, time and draw; the exit code is 0 if the policy learned."""
    options = parse(argv)
    load = os.getloadavg()[0]  # what other programs are doing, before this one adds to it
    spec = gym.spec(options.env)
    solved = spec.reward_threshold
    print(
        f"{options.env}: {options.generations} generations of {options.population} episodes "
        f"on {options.processes} processes"
    )
    untrained = initial_policy(options.env, options.seed)
    with fiber.Pool(options.processes) as pool:
        theta, history = train(pool, options)
        before = fresh_rewards(pool, options.env, untrained, options.seed)
        after = fresh_rewards(pool, options.env, theta, options.seed)
        episodes, alone, together = time_both_ways(pool, options)

    mark = "no mark set" if solved is None else f"{solved:.1f}"
    print(f"\nMean reward of {FRESH_EPISODES} fresh episodes")
    print(f"  untrained  {before.mean():8.1f}")
    print(f"  learned    {after.mean():8.1f}")
    print(f"  solved at  {mark:>8}")
    print(
        f"\nSpeed-up: {alone / together:.2f}x with {options.processes} processes on "
        f"{fiber.cpu_count()} CPUs (load before the start: {load:.1f})\n  {episodes} episodes: "
        f"{alone:.2f} s in one process, {together:.2f} s in the pool, the same rewards"
    )
    plot(options.output, options.env, history, float(before.mean()), after, solved)
    print(f"Learning curve: {options.output.resolve()}")

    # Chance alone moves a mean by its standard error; four of them are no chance.
    error = float(np.hypot(before.std(), after.std())) / FRESH_EPISODES**0.5
    needed = before.mean() + 4 * error
    if solved is not None:
        needed = max(needed, (before.mean() + solved) / 2)
    if after.mean() <= needed:
        print(
            f"\n{options.env} was not learned: a mean reward above {needed:.1f} was needed; "
            "try more --generations or a larger --population.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
