"""The master's side of the code connections: a question in, an answer out.

    (BUNDLE or MODULE, body) ─► answer ─► bundle, project ─► (kind, body)

It knows no socket. What was answered once is kept as bytes: hundreds of workers ask the same.
"""

from __future__ import annotations

from fiber.code import bundle, protocol
from fiber.code.project import Project

__all__ = ["Server"]

_MAGIC = 4  # bytes of `importlib.util.MAGIC_NUMBER`


class Server:
    """Answers for `project`; from any thread."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._answers: dict[bytes, bytes] = {}

    def answer(self, kind: int, body: bytes) -> tuple[int, bytes]:
        """Return the kind and the body of the answer to a question."""
        try:
            if kind == protocol.BUNDLE:
                return kind, bundle.bundle(bytes(body))
            if kind == protocol.MODULE:
                return kind, self._module(bytes(body))
            reason = f"a question of kind {kind} is none that this version of Fiber knows"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        return protocol.REFUSED, reason.encode()

    def _module(self, body: bytes) -> bytes:
        answer = self._answers.get(body)
        if answer is None:
            magic, name = body[:_MAGIC], body[_MAGIC:].decode()
            answer = protocol.pack(self._project.module(name, magic))
            if answer:  # what is no module of the project need not be remembered: names abound
                self._answers[body] = answer
        return answer
