"""The Slurm backend: a job is a batch job, or a task of a step.

    backend ──► batch ──► sbatch: an array for all that is asked for at once
       │         └──────► poller: one squeue for everything that the session has
       ├──────► steps ──► srun: one step for all that is asked for at once; its tasks are keepers
       ├─ options   what is asked of Slurm: configuration, resources, the user's variables
       ├─ sharing   how many workers of a pool share a task, by what nodes have
       ├─ commands  how Slurm's commands are run: environment, time-outs, what their errors mean
       ├─ states    Slurm's words for how a job is, in Fiber's
       ├─ shared    the folder that this machine and the nodes share: descriptions and the secret
       ├─ network   where jobs reach this process
       └─ janitor   the process that ends all of it when this one is killed

`keeper` runs on the nodes, by its path, on whatever Python is there. Nothing but Slurm's commands
and the standard library is needed. `detect` must stay cheap to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fiber.backends.slurm.backend import SlurmBackend

__all__ = ["SlurmBackend"]


def __getattr__(name: str) -> object:
    if name == "SlurmBackend":
        from fiber.backends.slurm.backend import SlurmBackend

        return SlurmBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
