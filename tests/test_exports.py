"""The public names of the package, in one place: whatever is added or lost shows here."""

from __future__ import annotations

import multiprocessing
import types

import fiber

PUBLIC = set(multiprocessing.__all__) | {
    # Fiber's own
    "ConfigError",
    "FiberContext",
    "FiberError",
    "ObjectRef",
    "PeerDied",
    "PoolBroken",
    "PoolClosed",
    "PoolError",
    "PoolTerminated",
    "Ring",
    "RingBroken",
    "RemoteError",
    "SerializationError",
    "StartError",
    "TaskTimeout",
    "WorkerDied",
    "__version__",
    "config",
    "init",
    "meta",
    "put",
    "reset",
}


def test_all_lists_the_public_names() -> None:
    assert set(fiber.__all__) == PUBLIC
    assert len(fiber.__all__) == len(PUBLIC)


def test_each_public_name_is_there() -> None:
    for name in PUBLIC:
        assert getattr(fiber, name) is not None
        assert name in dir(fiber)


def test_nothing_else_looks_public() -> None:
    others = {
        name
        for name, value in vars(fiber).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert others - PUBLIC - {"annotations"} == set()


def test_config_is_the_configuration_and_not_its_module() -> None:
    assert fiber.config.retries == 2
