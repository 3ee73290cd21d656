"""The engines that tests need, which not every machine has: Docker, and a Kubernetes cluster.

    from tests import engines

    @pytest.fixture(scope="session")
    def docker() -> str:
        engines.require("docker")   # skips the test, with a reason
        return engines.image()      # has the Python of these tests, and nothing else

Where `FIBER_TEST_ENGINES` (`docker,kubernetes`) names an engine, its tests fail without it. A
cluster is used only if `KUBECONFIG` is set: pods shall not appear in whatever cluster somebody
works with.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import warnings

import pytest

# Read while tests are collected: later no FIBER_ variable is there.
REQUIRED = os.environ.get("FIBER_TEST_ENGINES", "").replace(",", " ").split()
IMAGE = os.environ.get("FIBER_TEST_IMAGE", "")
PATIENCE = 10.0  # seconds


def image() -> str:
    """The image that tests start containers and pods from."""
    return IMAGE or f"local/python:{sys.version_info[0]}.{sys.version_info[1]}"


def require(engine: str) -> None:
    """Skip the test, or fail it where the engine must be there, if it is not."""
    reason = missing(engine)
    if reason and engine in REQUIRED:
        pytest.fail(f"FIBER_TEST_ENGINES wants {engine}, but {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)


@functools.cache
def missing(engine: str) -> str:
    """Why `engine` cannot be used here; empty if it can."""
    with warnings.catch_warnings():
        # Docker's SDK leaves the socket open that it could not connect.
        warnings.simplefilter("ignore", ResourceWarning)
        reason = {"docker": _no_docker, "kubernetes": _no_kubernetes}[engine]()
        gc.collect()
    return reason


def _no_docker() -> str:
    import docker

    try:
        with contextlib.closing(docker.from_env(timeout=PATIENCE)) as client:
            client.images.get(image())
    except docker.errors.ImageNotFound:
        return f"Docker has no image {image()}: make it, or name another in FIBER_TEST_IMAGE"
    except Exception as error:
        return f"no Docker engine answers: {_line(error)}"
    return ""


def _no_kubernetes() -> str:
    if not os.environ.get("KUBECONFIG"):
        return "KUBECONFIG names no Kubernetes cluster"
    import kubernetes

    try:
        configuration = kubernetes.client.Configuration()
        configuration.retries = False
        kubernetes.config.load_kube_config(client_configuration=configuration)
        with kubernetes.client.ApiClient(configuration) as client:
            kubernetes.client.CoreV1Api(client).list_node(_request_timeout=PATIENCE)
    except Exception as error:
        return f"no Kubernetes cluster answers: {_line(error)}"
    return ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
