"""The folder that this machine and the nodes share: what jobs have to know is there.

    slurm_folder/slurm-<host>-<pid>-<random>, for us alone
        keeper.py          what runs on the nodes
        jobs-1.json, ...   the descriptions of the jobs of one call
        secret-1           of the session

The secret is on no command line and in no environment, and Slurm, which keeps scripts and
environments of jobs, never has it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Sequence

from fiber.backends.base import SECRET_FILE, JobSpec
from fiber.config import config
from fiber.errors import StartError

__all__ = ["Shared"]

_PREFIX = "slurm-"


class Shared:
    """A folder of this process.

    Raises:
        StartError: it cannot be made.
    """

    def __init__(self) -> None:
        base = os.path.abspath(os.path.expanduser(config.slurm_folder))
        host = socket.gethostname()
        name = f"{_PREFIX}{host}-{os.getpid()}-{os.urandom(4).hex()}"
        self.path = os.path.join(base, name)
        self._count = itertools.count(1)
        self._secrets: dict[bytes, str] = {}
        self._lock = threading.Lock()
        try:
            os.makedirs(base, mode=0o700, exist_ok=True)
            _sweep(base, host)
            os.mkdir(self.path, 0o700)
            source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "keeper.py")
            with open(source, "rb") as file:
                self._write("keeper.py", file.read())
        except OSError as error:
            raise StartError(
                f"The folder {base}, which this machine and the nodes of Slurm should share, "
                f"cannot be used: {error.strerror}. Set slurm_folder to another one."
            ) from error

    def describe(
        self, specs: Sequence[JobSpec], log: str = "", memory: int | None = None, first: int = 0
    ) -> str:
        """Write a file that describes jobs; return its path.

        Args:
            specs: of the jobs.
            log: where each writes, if that is the keeper's work: `%k` stands for its number, `%j`
                for that of Slurm's job.
            memory: that each may use, in MB, if that is the keeper's work.
            first: the number of the first one.
        """
        texts: dict[str, int] = {}

        def text(value: str) -> int:  # most of it is the same in all of them
            return texts.setdefault(value, len(texts))

        jobs = []
        for number, spec in enumerate(specs):
            environment = dict(spec.environment)
            if spec.secret:
                environment[SECRET_FILE] = self._secret(spec.secret)
            jobs.append(
                {
                    "command": [text(part) for part in spec.command],
                    "environment": [(text(k), text(v)) for k, v in environment.items()],
                    "log": log.replace("%k", str(first + number)),
                    "memory": memory,
                    "processes": spec.processes,
                }
            )
        name = f"jobs-{next(self._count)}.json"
        self._write(name, json.dumps({"texts": list(texts), "jobs": jobs}).encode())
        return os.path.join(self.path, name)

    def _secret(self, secret: bytes) -> str:
        with self._lock:
            path = self._secrets.get(secret)
            if path is None:
                name = f"secret-{len(self._secrets) + 1}"
                self._write(name, secret)
                path = self._secrets[secret] = os.path.join(self.path, name)
            return path

    def _write(self, name: str, data: bytes) -> None:
        path = os.path.join(self.path, name)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)

    def keeper(self, *arguments: str) -> list[str]:
        """Return the command that runs the keeper on a node."""
        return [*python(), "-I", "-S", os.path.join(self.path, "keeper.py"), *arguments]

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def python() -> list[str]:
    """Return the command that runs Python on a node."""
    import shlex
    import sys

    return shlex.split(config.slurm_python) if config.slurm_python else [sys.executable]


def _sweep(base: str, host: str) -> None:
    """Remove what programs of this host left when they and their janitors were killed."""
    for name in os.listdir(base):
        found = re.fullmatch(rf"{re.escape(_PREFIX + host)}-(\d+)-[0-9a-f]{{8}}", name)
        if found is None:
            continue
        try:
            os.kill(int(found[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(os.path.join(base, name), ignore_errors=True)
        except OSError:
            pass  # the number is in use, by somebody else's process
