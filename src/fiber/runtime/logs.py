"""Fiber's log, as the configuration asks for it.

Everything goes to the logger `fiber`. Its records are the program's to handle; only where the
configuration sets `log_level`, `log_file` or `debug` does Fiber add a handler of its own. The
module `logging` is loaded when there is something to log: it is a good part of the import's time.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from fiber.config import config
from fiber.errors import ConfigError

__all__ = [
    "DEBUG",
    "ERROR",
    "INFO",
    "WARNING",
    "adopt",
    "configure",
    "log",
    "of_multiprocessing",
]

DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40
"""Levels, as those of the logging module."""

_FORMAT = "%(asctime)s %(levelname)s %(processName)s[%(process)d] %(message)s"

_handler: Any = None


def log(level: int, message: str, *args: object) -> None:
    """Log `message % args`; below warnings that is nothing while nobody has loaded logging."""
    if level < WARNING and "logging" not in sys.modules:
        return
    import logging

    logging.getLogger("fiber").log(level, message, *args)


def of_multiprocessing() -> tuple[int, bool] | None:
    """Return the level of multiprocessing's logger, if it is in use, and if it goes to stderr."""
    util: Any = sys.modules.get("multiprocessing.util")
    if util is None or util._logger is None:
        return None
    return util._logger.getEffectiveLevel(), bool(util._log_to_stderr)


def adopt(level: int, to_stderr: bool) -> None:
    """Set up multiprocessing's logger as the parent's is."""
    from multiprocessing import util

    if to_stderr:
        util.log_to_stderr()
    util.get_logger().setLevel(level)


def configure(*, child: bool = False) -> None:
    """Set up the log of this process; `child` keeps its file apart from that of its parent.

    Raises:
        ConfigError: the configured file cannot be written.
    """
    global _handler
    level = DEBUG if config.debug else config.log_level
    if level == WARNING and config.log_file is None and _handler is None:
        return  # the defaults: then it is the program's to set up
    import logging

    logger = logging.getLogger("fiber")
    if _handler is not None:
        logger.removeHandler(_handler)
        _handler.close()
        _handler = None
    if level != WARNING:
        logger.setLevel(level)
    if config.log_file == "stdout":
        _handler = logging.StreamHandler(sys.stdout)
    elif config.log_file is not None:
        path = f"{config.log_file}.{os.getpid()}" if child else config.log_file
        try:
            _handler = logging.FileHandler(path)
        except OSError as error:
            raise ConfigError(f"log_file {path!r} cannot be written: {error.strerror}") from error
    elif level < WARNING and not logger.hasHandlers():
        _handler = logging.StreamHandler()
    if _handler is not None:
        _handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(_handler)
