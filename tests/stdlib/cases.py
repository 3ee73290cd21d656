"""The test classes of CPython's file, under a name by which child processes import them too."""

from __future__ import annotations

from typing import Any

from tests.stdlib.adapted import put_in_place
from tests.stdlib.suite import load

_namespace: dict[str, Any] = load(__name__)
put_in_place(_namespace)
globals().update({_name: _namespace[_name] for _name in _namespace if _name[:2] != "__"})
