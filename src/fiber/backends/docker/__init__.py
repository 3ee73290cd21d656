"""The docker backend: a job is a container of a Docker engine.

    backend     ─ DockerBackend, the protocol: many jobs in a call, all of them or none
    arguments   ─ from a job's spec and the configuration to what the SDK is asked for
    engine      ─ the connection to the engine; its one stream of events, and what it tells
    container   ─ a job: what was heard of it, and what that means
    tails       ─ the last lines that each container wrote
    network     ─ where containers reach this process
    janitor     ─ a process that removes what a master left that was killed

The engine removes containers when they end, for nobody else would if the master was killed. So what
there is to know of them is heard while they live: their ends by the stream of events, their output
by a socket each.
"""

from fiber.backends.docker.backend import DockerBackend

__all__ = ["DockerBackend"]
