"""The manifest that grants what this backend needs: rbac.yaml, for a namespace."""

from __future__ import annotations

import importlib.resources
import re

__all__ = ["COMMAND", "manifest"]

COMMAND = "fiber kubernetes manifest"
"""The command that prints it."""


def manifest(namespace: str = "default") -> str:
    """Return a ServiceAccount, a Role and a RoleBinding as YAML, for `kubectl apply -f -`.

    Raises:
        ValueError: `namespace` is no name of a namespace.
    """
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", namespace):
        raise ValueError(
            f"{namespace!r} cannot be a namespace: its name is of at most 63 lower-case letters, "
            f"digits and dashes, and begins and ends with a letter or digit"
        )
    text = importlib.resources.files(__package__).joinpath("rbac.yaml").read_text("utf-8")
    return text.replace("NAMESPACE", namespace)
