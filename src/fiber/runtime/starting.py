"""Starting agents elsewhere: who sees to the jobs, and what their agents are told.

session ─► orders: the master's own `Outside`, or `Errands` to it
        ─► preparation: the program, to be loaded where its files are not
        ─► begin ─► RemoteAgent
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fiber.code import packages
from fiber.code.project import Project, main_source
from fiber.config import config
from fiber.runtime import main
from fiber.runtime.errands import Errands
from fiber.runtime.orders import Needs
from fiber.runtime.outside import Outside
from fiber.runtime.places import connect
from fiber.runtime.remote import RemoteAgent
from fiber.runtime.session import program

if TYPE_CHECKING:
    from fiber.runtime.session import Session

__all__ = ["begin", "orders", "preparation"]

_CONNECT_TIMEOUT = 30.0  # seconds
_KINDS = {"docker": "container", "kubernetes": "pod", "slurm": "Slurm job"}
_WITH_IMAGES = ("docker", "kubernetes")
_AT_HOME = (
    "fiber.backends.",
    "fiber.cli",
    "fiber.code.",
    "fiber.runtime.jobs",
    "fiber.runtime.outside",
    "fiber.runtime.starting",
    "fiber.testing",
)
"""Modules that are of no use elsewhere, of little, or need what is not there: each agent would load
them, which takes a tenth of the time until it is ready."""


def orders(session: Session) -> Outside | Errands:
    """Return who has jobs started for this process. Not within the loop.

    Raises:
        StartError: nobody can; the message says why.
    """
    master = session.master_address
    if master is None:
        session.keep_clean()  # there may be no agent on this machine
        with session.loop:
            return Outside(session)
    channel = connect(master, _CONNECT_TIMEOUT)
    with session.loop:
        return Errands(session.loop, channel)


def preparation(session: Session, by: Outside | Errands) -> dict[str, Any]:
    """Return what an agent elsewhere is told of this program."""
    source = program() or main_source(main.describe())
    project = by.project if isinstance(by, Outside) else Project()
    loaded = sorted(name for name in sys.modules if name.startswith("fiber."))
    return {
        "argv": list(sys.argv),
        "main": None if source is None else tuple(source),
        "tops": project.tops(),
        "packages": packages.loaded(),
        "modules": [name for name in loaded if not name.startswith(_AT_HOME)],
        "image": config.image or "the image",
        "tls_key": session.tls_key,
        "owned_by_master": isinstance(by, Outside),
    }


def begin(
    session: Session,
    by: Outside | Errands,
    backend: str,
    needs: Needs,
    told: Mapping[str, Any],
) -> RemoteAgent:
    """Have a job of `backend` started; return its agent. Within the loop."""
    agent = RemoteAgent(session.loop, _KINDS.get(backend, f"{backend} job"))
    # What its processes start goes the same way; the log's file would be in the container.
    agent.settings = {"backend": backend, "log_file": None}
    name = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else "fiber"
    owner = session.endpoint.address

    def order(token: str, changed: Any) -> Any:
        return by.order(backend, name, needs, token, owner, changed)

    if isinstance(by, Outside):
        agent.on_ready = by.place_is_there
    cpu = needs[0].cpu or config.cpu_per_job
    where = told["image"] if backend in _WITH_IMAGES else f"the Python of {backend} jobs"
    agent.begin(order, session.endpoint, {**told, "cpu": cpu, "image": where})

    def gone() -> None:
        if isinstance(by, Outside):
            by.place_is_gone(agent.place)
        session.agency.forget(agent)

    agent.on_gone = gone
    return agent
