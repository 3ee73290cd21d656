"""The command `fiber`, also `python -m fiber`: what one asks Fiber from a shell.

    fiber config                   ─► the effective configuration, and where each value comes from
    fiber kubernetes manifest      ─► the rights that Fiber needs in a cluster, for kubectl apply
    fiber --version

What was asked for goes to standard output and nothing else does. An error is a sentence on standard
error; the exit code is 2 if the command was called wrongly, 1 if it could not be carried out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from fiber import __version__, config
from fiber.errors import FiberError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code.

    Args:
        arguments: those of the command line by default.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except FiberError as error:
        print(f"fiber: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read it has seen enough. Python would complain of it again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fiber",
        description="Run multiprocessing programs on one machine, in containers and on clusters.",
        epilog="A program needs no command: python program.py runs it. FIBER_BACKEND says where.",
    )
    parser.add_argument("--version", action="version", version=f"fiber {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    shown = commands.add_parser(
        "config",
        help="print the effective configuration",
        description="Print the configuration that a program which is started here would have: "
        "each key with its value and where that comes from. At the end, the backend.",
    )
    shown.set_defaults(run=_config)

    kubernetes = commands.add_parser(
        "kubernetes",
        help="print what a Kubernetes cluster needs",
        description="Print what a Kubernetes cluster needs before Fiber can start pods there.",
    )
    commands = kubernetes.add_subparsers(metavar="COMMAND", required=True)
    manifest = commands.add_parser(
        "manifest",
        help="print the manifest that grants the rights",
        description="Print the manifest that grants what a program which uses Fiber needs, and no "
        "more: a service account, a role and its binding, as YAML.",
        epilog="To grant it: fiber kubernetes manifest --namespace team | kubectl apply -f -",
    )
    manifest.add_argument(
        "-n",
        "--namespace",
        help="where pods are started; by default that of the configuration, else 'default'",
    )
    manifest.set_defaults(run=_manifest, parser=manifest)
    return parser


def _config(options: argparse.Namespace) -> int:
    from fiber.backends import registry

    rows = [
        (name, _in_words(name, value), config.source(name))
        for name, value in config.as_dict().items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, value, source in rows:
        print(f"{name:{widths[0]}} = {value:{widths[1]}}  ({source})")
    print(f"\nProcesses start on the backend {registry.chosen()!r}.")
    return 0


def _in_words(name: str, value: Any) -> str:
    from fiber.parsers import LEVELS

    if value is None:
        return "none"
    if name == "log_level":
        return {number: word for word, number in LEVELS.items()}.get(value, str(value))
    return value if isinstance(value, str) else json.dumps(value)


def _manifest(options: argparse.Namespace) -> int:
    from fiber.backends.kubernetes import rbac

    namespace = options.namespace
    if namespace is None:
        namespace = config.kubernetes_namespace or "default"
    try:
        print(rbac.manifest(namespace).rstrip())
    except ValueError as error:
        options.parser.error(str(error))
    return 0
