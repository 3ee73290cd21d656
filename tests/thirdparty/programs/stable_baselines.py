"""Stable-Baselines3 trains on environments in processes of Fiber."""

import gymnasium
import stable_baselines3.common.vec_env.subproc_vec_env
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import fiber

stable_baselines3.common.vec_env.subproc_vec_env.mp = fiber


def make():
    return gymnasium.make("CartPole-v1")


def train(envs):
    model = PPO("MlpPolicy", envs, n_steps=64, batch_size=64, n_epochs=2, seed=1, device="cpu")
    model.learn(256)
    weights = sum(p.abs().sum().item() for p in model.policy.parameters())
    print("environments:", envs.num_envs, "steps:", model.num_timesteps)
    envs.close()
    return weights


if __name__ == "__main__":
    envs = SubprocVecEnv([make, make])
    together = train(envs)
    print("exit codes:", *(process.exitcode for process in envs.processes))
    print("same weights:", together == train(DummyVecEnv([make, make])))
