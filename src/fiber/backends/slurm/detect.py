"""Whether this process is in an allocation of Slurm. Cheap to import.

A container in an allocation may have Slurm's variables and not its commands: there it is on its
own, and its processes are those of any machine.
"""

from __future__ import annotations

import os

__all__ = ["in_allocation", "in_step"]


def in_allocation() -> bool:
    """Whether there is an allocation around this process, and a way to use it."""
    if not os.environ.get("SLURM_JOB_ID"):
        return False
    import shutil  # slow to import

    return shutil.which("srun") is not None


def in_step() -> bool:
    """Whether this process is in a step of its own, as under `srun --pty bash`.

    The script of a batch job and the shell of `salloc` are in none that would have a number.
    """
    return os.environ.get("SLURM_STEP_ID", "").isdecimal()
