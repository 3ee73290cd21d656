"""The catalogue of rows: what each measures, in which cases, and how its figures are printed.

    base                               what a row is
    pools, large, scale, objects       the rows by theme

The measurements themselves have the same names, in `measure`, `large`, `scale`, `evolution`,
`simulation` and `objects`.
"""

from __future__ import annotations

from benchmarks.rows.base import BASELINE, COUNTED, FLOOR, Case, Metric, Panel, Row
from benchmarks.rows.large import LARGE
from benchmarks.rows.objects import SHARED
from benchmarks.rows.pools import POOLS
from benchmarks.rows.scale import SCALE

__all__ = ["BASELINE", "COUNTED", "FLOOR", "ROWS", "Case", "Metric", "Panel", "Row"]

ROWS = {row.name: row for row in (*POOLS, *LARGE, *SCALE, *SHARED)}
