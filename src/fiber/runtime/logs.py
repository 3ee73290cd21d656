"""Fiber's log, as the configuration asks for it.

Everything goes to the logger `fiber`. Its records are the program's to handle; only where the
configuration sets `log_level`, `log_file` or `debug` does Fiber add a handler of its own.
"""

from __future__ import annotations

import logging
import os
import sys

from fiber.config import config
from fiber.errors import ConfigError

__all__ = ["configure", "logger"]

logger = logging.getLogger("fiber")

_FORMAT = "%(asctime)s %(levelname)s %(processName)s[%(process)d] %(message)s"

_handler: logging.Handler | None = None


def configure(*, child: bool = False) -> None:
    """Set up the log of this process; `child` keeps its file apart from that of its parent."""
    global _handler
    if _handler is not None:
        logger.removeHandler(_handler)
        _handler.close()
        _handler = None
    level = logging.DEBUG if config.debug else config.log_level
    if level != logging.WARNING:  # the default: then it is the program's to set
        logger.setLevel(level)
    if config.log_file == "stdout":
        _handler = logging.StreamHandler(sys.stdout)
    elif config.log_file is not None:
        path = f"{config.log_file}.{os.getpid()}" if child else config.log_file
        try:
            _handler = logging.FileHandler(path)
        except OSError as error:
            raise ConfigError(f"log_file {path!r} cannot be written: {error.strerror}") from error
    elif level < logging.WARNING and not logger.hasHandlers():
        _handler = logging.StreamHandler()
    if _handler is not None:
        _handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(_handler)
