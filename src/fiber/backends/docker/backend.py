"""The docker backend: a job is a container, started through the SDK of Docker.

    submit:  image there? ─► for each, some at a time: create ─► secret ─► attach ─► start
                                                        └─ one fails: all are removed ─► StartError

The connection is made at first use and closed at the end of the session; another session makes
another.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from fiber.backends.base import Job, JobSpec, JobState, JobStatus
from fiber.backends.docker.arguments import arguments, image_name, secret_archive
from fiber.backends.docker.container import Container
from fiber.backends.docker.engine import Engine, each, words
from fiber.backends.docker.network import hosts, network_name, own_container
from fiber.backends.docker.tails import Tail
from fiber.errors import ConfigError, StartError

__all__ = ["DockerBackend"]

_OUTAGE = 30.0  # seconds that an engine may be away while jobs are submitted
_LOOK_AGAIN = 0.5  # seconds

_number = itertools.count(1)


class DockerBackend:
    """Starts jobs as containers.

    Raises:
        ConfigError: the SDK is not installed.
    """

    name = "docker"
    elsewhere = True
    python: Sequence[str] = ("python3",)

    def __init__(self) -> None:
        self._docker = _sdk()
        self._lock = threading.Lock()
        self._made: tuple[Engine, int] | None = None

    def _engine(self) -> Engine:
        with self._lock:
            if self._made is None or self._made[1] != os.getpid():
                self._made = Engine(self._docker), os.getpid()
            return self._made[0]

    def submit(self, specs: Sequence[JobSpec]) -> list[Job]:
        """Create and start a container for each spec."""
        engine = self._engine()
        try:
            try:
                return self._submit(engine, specs)
            except self._docker.errors.APIError:
                raise
            except engine.failures:
                if not _wait_for(engine):
                    raise
                return self._submit(engine, specs)
        except engine.failures as error:
            raise StartError(_refused(error)) from error

    def _submit(self, engine: Engine, specs: Sequence[JobSpec]) -> list[Job]:
        own = own_container(engine.api, engine.errors)
        network = network_name(own)
        image = image_name()
        user = _image_user(engine, image)
        engine.prepare()
        made: list[str] = []

        def start(spec: JobSpec) -> Container:
            number = next(_number)
            name = f"fiber-{spec.session or 'job'}-{number}"
            label, _, value = engine.label.partition("=")
            wanted = arguments(spec, name, image, {label: value}, network, number - 1)
            try:
                key = engine.client.containers.create(**wanted.create).id
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise ConfigError(
                    "The config key 'docker_options' holds what containers.create of Docker's SDK "
                    f"does not take: {error}"
                ) from error
            made.append(key)
            if spec.secret:
                archive = secret_archive(spec.secret, wanted.user or user, wanted.volume)
                engine.api.put_archive(key, *archive)
            container = Container(
                name, key, image, spec.command[0], wanted.limit, engine.node, Tail()
            )
            engine.attach(container)
            engine.start(container)
            return container

        try:
            return list(each(start, specs))
        except BaseException:
            each(engine.discard, made)
            raise

    def status(self, jobs: Sequence[Job]) -> list[JobStatus]:
        """Return what was heard of the containers."""
        engine = self._made[0] if self._made is not None else None
        if engine is None:
            return [_container(job).status(time.monotonic()) for job in jobs]
        with engine.changed:
            return _statuses(engine, jobs)

    def wait(self, jobs: Sequence[Job], timeout: float) -> list[JobStatus]:
        """Wait until the engine tells that one of the containers has ended."""
        deadline = time.monotonic() + timeout
        engine = self._made[0] if self._made is not None else None
        if engine is None:  # closed, so that all have ended
            return self.status(jobs)
        with engine.changed:
            while True:
                statuses = _statuses(engine, jobs)
                rest = deadline - time.monotonic()
                if any(status.state is JobState.ENDED for status in statuses) or rest <= 0:
                    return statuses
                undecided = any(_container(job).undecided for job in jobs)
                engine.changed.wait(min(rest, _LOOK_AGAIN) if undecided else rest)

    def terminate(self, jobs: Sequence[Job]) -> None:
        """Send SIGTERM to the commands in the containers."""
        if self._made is not None:
            engine = self._made[0]
            each(lambda job: engine.signal(_container(job), "SIGTERM"), jobs)

    def kill(self, jobs: Sequence[Job]) -> None:
        """Remove the containers, whatever they do."""
        if self._made is not None:
            engine = self._made[0]
            each(lambda job: engine.remove(_container(job)), jobs)

    def logs(self, job: Job, lines: int = 20) -> str:
        """Return the last lines of what the container wrote, of its last 16 KB."""
        container = _container(job)
        return container.tail.text(lines, whole=container.ended)

    def addresses(self, port: int) -> list[str]:
        """Return where containers reach `port` of this process."""
        engine = self._engine()
        try:
            own = own_container(engine.api, engine.errors)
            network = network_name(own)
            found = hosts(engine.api, engine.errors, engine.api.base_url, network, own)
        except engine.failures as error:
            raise StartError(_refused(error)) from error
        return [f"{host}:{port}" for host in found]

    def close(self) -> None:
        """Remove all containers that are left, and close the connection."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None and made[1] == os.getpid():
            made[0].close()


def _sdk() -> Any:
    try:
        docker = importlib.import_module("docker")
    except ImportError:
        docker = None
    if not hasattr(docker, "from_env"):  # a folder of the project may be called so
        raise ConfigError(
            "The backend 'docker' needs the package 'docker', Docker's SDK for Python, which is "
            'not installed: run pip install "fiber[docker]".'
        )
    return docker


def _container(job: Job) -> Container:
    assert isinstance(job, Container)
    return job


def _statuses(engine: Engine, jobs: Sequence[Job]) -> list[JobStatus]:
    now = time.monotonic()
    statuses = [_container(job).status(now) for job in jobs]
    if not engine.away:
        return statuses
    unknown = JobStatus(JobState.UNKNOWN, node=engine.node, message=engine.away)
    return [status if status.state is JobState.ENDED else unknown for status in statuses]


def _image_user(engine: Engine, image: str) -> str:
    """Return the user that `image` names, fetching it if it is not there."""
    try:
        try:
            about = engine.api.inspect_image(image)
        except engine.errors.ImageNotFound:
            logging.getLogger("fiber").info("the image %s is not there: fetching it", image)
            engine.client.images.pull(image)
            about = engine.api.inspect_image(image)
    except engine.errors.APIError as error:
        raise StartError(
            f"The image {image} is not there and cannot be fetched: {words(error)}. Set image to "
            "one that `docker images` shows or `docker pull` fetches, with the same Python as here."
        ) from error
    return str((about.get("Config") or {}).get("User") or "")


def _wait_for(engine: Engine) -> bool:
    deadline = time.monotonic() + _OUTAGE
    while time.monotonic() < deadline:
        try:
            engine.api.ping()
        except engine.failures:
            time.sleep(_LOOK_AGAIN)
        else:
            return True
    return False


def _refused(error: BaseException) -> str:
    what = words(error)
    hints = {
        "CPUs available": "Ask for fewer with @fiber.meta(cpu=...) or the setting cpu_per_job.",
        "Minimum memory limit": "Ask for more with @fiber.meta(memory=...) or mem_per_job.",
        "could not select device driver": "The engine needs NVIDIA's container toolkit for GPUs.",
        "docker-init": "The engine has no docker-init: set docker_options to {'init': False}.",
        "network": "See docker_network, and `docker network ls`.",
        "mount": "See docker_mounts.",
        "read-only": "See docker_options.",
    }
    hint = next((hints[part] for part in hints if part in what), "")
    return f"The Docker engine did not start the container: {what}. {hint}".strip()
