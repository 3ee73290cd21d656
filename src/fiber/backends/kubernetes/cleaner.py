"""The process that removes a program's pods and Secrets when the program was killed.

    the program ── a pipe ──► cleaner: waits for its end ─► deletes by label ─► ends

It is told once, through the pipe, what there is to delete. While the program lives it sleeps; the
client of Kubernetes, which takes a second and 50 MB to load, it loads only when there is work. The
program's end closes the pipe, whatever the end was; if it ended in order, it has said so before.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import IO, Any

__all__ = ["Cleaner"]

_PATIENCE = 600.0  # seconds for which an API server that is away is asked again
_PAUSE = 1.0


class Cleaner:
    """Cleans up after this process, unless it is dismissed.

    Args:
        place: cluster and namespace.
        selector: of the label of what there is to delete.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, place: tuple[str | None, str], selector: str) -> None:
        import subprocess

        null = subprocess.DEVNULL
        # In a session of its own, that of Unix: a signal to the program's group is not for it.
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {_PROGRAM}"],
            stdin=subprocess.PIPE,
            stdout=null,
            stderr=null,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe: IO[bytes] = self._process.stdin
        self._say({"place": place, "selector": selector})

    def remember(self, secret: str) -> None:
        """There is a Secret to be deleted, too."""
        self._say({"secret": secret})

    def dismiss(self) -> None:
        """All is clean: end it."""
        self._process.kill()
        self._close()
        self._process.wait()

    def leave(self) -> None:
        """Let it do what this process, which ends, could not."""
        self._close()
        self._process.returncode = 0  # or there would be a warning that it still runs

    def forget(self) -> None:
        """After `os.fork`, in the child: it is the parent's."""
        self.leave()

    def _say(self, what: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it was killed: then the next session must do without
            self._pipe.write(json.dumps(what).encode() + b"\n")
            self._pipe.flush()

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.close()


_PROGRAM = "from fiber.backends.kubernetes.cleaner import clean; clean(sys.stdin.buffer)"


def clean(pipe: IO[bytes]) -> None:
    """Wait for the end of `pipe`, and delete what it told of."""
    about: dict[str, Any] = {}
    secrets: list[str] = []
    for line in pipe:
        said = json.loads(line)
        if "secret" in said:
            secrets.append(said["secret"])
        else:
            about = said
    deadline = time.monotonic() + _PATIENCE
    while about and time.monotonic() < deadline:
        try:
            _delete(about, secrets)
            return
        except Exception:  # whatever it was: nobody is there to be told, so try again
            time.sleep(_PAUSE)


def _delete(about: dict[str, Any], secrets: list[str]) -> None:
    from fiber.backends.kubernetes.access import Access, ApiError, Place

    access = Access(Place(*about["place"]))

    def attempt(delete: Callable[[str], None], what: str) -> None:
        try:
            delete(what)
        except ApiError as error:
            if error.away:
                raise  # else it is not allowed, and never will be

    for secret in secrets:
        attempt(access.delete_secret, secret)
    # What the program asked for in its last moment may come after our first look.
    for pause in (0.5, 2.0, 0.0):
        attempt(access.delete_pods, about["selector"])
        time.sleep(pause)
