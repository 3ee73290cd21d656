"""Gymnasium's AsyncVectorEnv makes its processes, pipes, queue and shared memory with Fiber.

usage: gymnasium_async.py same | error | late | limit
"""

import sys
import time
from itertools import pairwise

import gymnasium
import gymnasium.vector.async_vector_env
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

import fiber

gymnasium.vector.async_vector_env.multiprocessing = fiber


class Walk(gymnasium.Env):
    """A random walk whose observations are of all kinds that shared memory holds."""

    action_space = spaces.Discrete(3)
    observation_space = spaces.Dict(
        {
            "position": spaces.Box(-100, 100, (2, 2), np.float32),
            "steps": spaces.Discrete(1_000),
            "flags": spaces.Tuple([spaces.MultiBinary(3), spaces.Box(0, 255, (4,), np.uint8)]),
        }
    )

    def __init__(self, length=20):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.steps = np.zeros((2, 2), np.float32), 0
        return self.observe(), {}

    def step(self, action):
        self.position += (action - 1) * self.np_random.random((2, 2), np.float32)
        self.steps += 1
        return self.observe(), float(self.position.sum()), self.steps >= self.length, False, {}

    def observe(self):
        low = self.steps % 256
        return {
            "position": self.position,
            "steps": self.steps,
            "flags": (
                np.array([self.steps & bit > 0 for bit in (1, 2, 4)], np.int8),
                np.arange(low, low + 4).astype(np.uint8),
            ),
        }


class Fragile(Walk):
    def step(self, action):
        if action == 2:
            raise ValueError("the env fell over")
        return super().step(action)


class Slow(Walk):
    def step(self, action):
        started = time.monotonic()
        time.sleep(0.1 * action)
        observation, reward, ended, cut, _ = super().step(action)
        return observation, reward, ended, cut, {"span": (started, time.monotonic())}


def play(envs, steps=50):
    """All that a policy would see of some steps, as one list."""
    random = np.random.default_rng(3)
    seen = [envs.reset(seed=7)]
    for _ in range(steps):
        actions = random.integers(envs.single_action_space.n, size=envs.num_envs)
        seen.append(envs.step(actions))
    return seen


def same():
    """The same episodes as one process plays, with shared memory and without."""
    for make in (Walk, lambda: gymnasium.make("CartPole-v1")):
        alone = SyncVectorEnv([make] * 3)
        expected = play(alone)
        for shared_memory in (True, False):
            envs = AsyncVectorEnv([make] * 3, shared_memory=shared_memory, context="spawn")
            np.testing.assert_equal(play(envs), expected)
            envs.close()
            print("same:", *(process.exitcode for process in envs.processes))
        alone.close()
    envs = gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="async")
    envs.reset(seed=1)
    envs.set_attr("speed", [1, 2])
    print("attributes:", envs.get_attr("speed"))
    envs.close()


def error():
    """An error of one environment is raised here, as it was."""
    envs = AsyncVectorEnv([Fragile, Fragile])
    envs.reset(seed=1)
    try:
        envs.step([0, 2])
    except ValueError as error:
        print("raised:", error)
    envs.close(terminate=True)
    print("alive:", any(process.is_alive() for process in envs.processes))


def late():
    """A step that takes too long is a TimeoutError, and its processes can be ended."""
    envs = AsyncVectorEnv([Slow, Slow])
    envs.reset(seed=1)
    envs.step_async([2, 2])
    try:
        envs.step_wait(timeout=0.01)
    except fiber.TimeoutError as error:
        print("late:", error)
    envs.close(terminate=True)
    print("alive:", any(process.is_alive() for process in envs.processes))


def limit():
    """A semaphore keeps steps from running at the same time."""
    envs = AsyncVectorEnv([Slow] * 3, max_concurrency=1)
    envs.reset(seed=1)
    *_, info = envs.step([1, 1, 1])
    envs.close()
    spans = sorted(info["span"], key=lambda span: span[0])
    print("one by one:", all(a[1] <= b[0] for a, b in pairwise(spans)), len(spans))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
