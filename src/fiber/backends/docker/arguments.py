"""What the SDK is asked for: from a job's spec and the configuration to arguments of create.

    JobSpec + config (image, docker_*, cpu_per_job, mem_per_job) ──► Arguments

`docker_options` has the last word in everything that Fiber does not depend on.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from fiber.backends.base import SECRET_FILE, JobSpec
from fiber.config import config
from fiber.errors import ConfigError
from fiber.resources import gpu_environment

__all__ = ["Arguments", "arguments", "image_name", "secret_archive"]

# A folder that only we have, in a place that every image has, whoever its user is.
SECRET_FOLDER: Final = "/.fiber"
SECRET_PATH: Final = f"{SECRET_FOLDER}/secret"

OURS: Final = {
    "auto_remove": "containers are removed when they end, so that none is left behind",
    "command": "Fiber starts its own program",
    "detach": "it is of no use here",
    "image": "set image instead",
    "name": "every container needs a name of its own",
    "restart_policy": "containers are removed when they end",
    "tty": "a terminal mixes what Fiber keeps of a container's output",
}
_MERGED: Final = ("environment", "extra_hosts", "labels")
_JOINED: Final = ("mounts", "volumes", "device_requests")


class Arguments(NamedTuple):
    """Of a container.

    Attributes:
        create: for containers.create of the SDK.
        limit: of memory, in words; empty if there is none.
        user: that it runs as, as far as the configuration says.
        volume: whether the secret's folder is a volume, and so there already.
    """

    create: dict[str, Any]
    limit: str
    user: str
    volume: bool


def image_name() -> str:
    """Return the image of containers: by default a stock Python of this interpreter's version."""
    return config.image or "python:{}.{}-slim".format(*sys.version_info)


def arguments(
    spec: JobSpec, name: str, image: str, labels: Mapping[str, str], network: str | None, turn: int
) -> Arguments:
    """Return what to create for `spec`; `turn` is its number, for sharing out GPUs.

    Raises:
        ConfigError: `docker_options` holds what Fiber decides itself.
    """
    environment = {**spec.environment, **config.docker_environment}
    if spec.secret:
        environment[SECRET_FILE] = SECRET_PATH
    create: dict[str, Any] = {
        "image": image,
        # As the entry point, so that the image's own cannot get between.
        "entrypoint": list(spec.command),
        "name": name,
        "environment": environment,
        "labels": {**labels, "fiber.session": spec.session, "fiber.name": spec.name},
        "auto_remove": True,
        # The first process of a container ignores signals that it does not handle, and would have
        # to collect orphans. docker-init does both for it.
        "init": True,
        "nano_cpus": _cpus(spec) * 10**9,
        "network": network,
        "user": config.docker_user,
        "volumes": config.docker_mounts,
        "working_dir": config.docker_workdir,
    }
    memory = spec.resources.memory or config.mem_per_job
    if memory:
        create["mem_limit"] = create["memswap_limit"] = memory * spec.processes * 2**20
    if spec.resources.gpu:
        create["device_requests"] = [_gpus(spec.resources.gpu * spec.processes, turn)]
    if network is None or not network.startswith("container:"):
        create["extra_hosts"] = {"host.docker.internal": "host-gateway"}
    _add(create, config.docker_options, list(spec.command))
    volume = bool(spec.secret and create.get("read_only"))
    if volume:
        # Nothing can be put into such a container but into a volume, which is removed with it.
        mount = {"Target": SECRET_FOLDER, "Type": "volume", "ReadOnly": False}
        create["mounts"] = [*create.get("mounts", ()), mount]
    limit = create.get("mem_limit") or ""
    if isinstance(limit, int):
        limit = f"{limit // 2**20} MB"
    given = {key: value for key, value in create.items() if value not in (None, [], {})}
    return Arguments(given, limit, str(create.get("user") or ""), volume)


def _cpus(spec: JobSpec) -> int:
    """Return how many CPUs a container may use; the engine refuses more than there are."""
    if spec.resources.cpu is not None:
        return spec.resources.cpu * spec.processes
    several = config.cpu_per_job * spec.processes
    return config.cpu_per_job if spec.processes == 1 else min(several, os.cpu_count() or several)


def _add(create: dict[str, Any], options: Mapping[str, Any], command: list[str]) -> None:
    for key, value in options.items():
        if key in OURS:
            raise ConfigError(f"The config key 'docker_options' cannot hold {key!r}: {OURS[key]}.")
        if key in _MERGED and isinstance(value, Mapping):
            create[key] = {**create.get(key, {}), **value}
        elif key in _JOINED and isinstance(value, list):
            create[key] = [*create.get(key, ()), *value]
        else:
            create[key] = value
    if "entrypoint" in options:
        create["command"] = command
    if "mem_limit" in options and "memswap_limit" not in options:
        create["memswap_limit"] = create["mem_limit"]
    if not {"nano_cpus", "cpu_quota", "cpu_period"}.isdisjoint(options):
        create["nano_cpus"] = options.get("nano_cpus")  # the engine takes one way or the other
    if "network_mode" in options:
        create["network"] = None


def _gpus(count: int, turn: int) -> dict[str, Any]:
    # The engine gives every container the same first ones; where this machine's are seen, they
    # take turns.
    seen = gpu_environment(count, turn, {}).get("CUDA_VISIBLE_DEVICES", "")
    request: dict[str, Any] = {"capabilities": [["gpu"]]}
    return {**request, "device_ids": seen.split(",")} if seen else {**request, "count": count}


def secret_archive(secret: bytes, user: str, volume: bool) -> tuple[str, bytes]:
    """Return a folder of the container, and an archive with the secret to be unpacked in it.

    A user with a number owns the file. One with a name is known in the container alone, so there
    everybody can read it: all that runs in the container is the job.
    """
    number = user.partition(":")[0]
    owner = int(number) if number.isdecimal() else 0
    named = number not in ("", "root") and not number.isdecimal()
    where = SECRET_FOLDER if volume else "/"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        if not volume:
            folder = tarfile.TarInfo(SECRET_FOLDER.lstrip("/"))
            folder.type, folder.mode, folder.uid = tarfile.DIRTYPE, 0o755 if named else 0o700, owner
            archive.addfile(folder)
        file = tarfile.TarInfo(SECRET_PATH.removeprefix(where).lstrip("/"))
        file.size, file.mode, file.uid = len(secret), 0o444 if named else 0o400, owner
        archive.addfile(file, io.BytesIO(secret))
    return where, stream.getvalue()
