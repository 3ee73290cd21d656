"""The docker backend on a real engine. Its image is a stock Python without Fiber in it."""

from __future__ import annotations

from collections.abc import Iterator

import docker
import pytest

from fiber.backends.base import Backend
from fiber.backends.docker import DockerBackend
from fiber.config import config
from fiber.testing import BackendConformance

IMAGE = "local/python:3.11"


def probe() -> None:
    client = docker.from_env()
    try:
        client.api.inspect_image(IMAGE)
    finally:
        client.close()


@pytest.fixture(autouse=True)
def there(engine, clean_environ: None) -> None:
    engine("docker", probe)
    config.image = IMAGE


class TestDocker(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = DockerBackend()
        yield backend
        backend.close()
