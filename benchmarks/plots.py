"""Pictures of the rows that say how something scales: `plots/ROW.png`, from the stored results.

Nothing is drawn where matplotlib is not installed.
"""

from __future__ import annotations

import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.rows import FLOOR, Panel, Row

COLOURS = {
    "fiber": "tab:red",
    "multiprocessing": "tab:blue",
    "concurrent.futures": "tab:green",
    "loky": "tab:orange",
    "ray": "tab:purple",
    "dask": "tab:brown",
    FLOOR: "gray",
}
WIDE = 5.0  # times that the largest is the smallest, from which the axis is logarithmic
SIZE, DPI = (4.2, 3.2), 80  # inches of a panel, and dots for each


def draw(row: Row, data: dict[str, Any], folder: Path) -> Path | None:
    """Draw a row's figures into `folder`; return the file, None if there is nothing to draw."""
    if not row.panels or find_spec("matplotlib") is None:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = row.panels
    figure, axes = plt.subplots(
        1, len(panels), figsize=(SIZE[0] * len(panels), SIZE[1]), squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        shown: list[float] = []
        for peer, columns in data["values"].items():
            points = _points(panel, columns)
            if points:
                label = row.floor if peer == FLOOR else peer
                style = "--" if peer == FLOOR else "o-"
                xs, ys = zip(*points, strict=True)
                shown.extend(ys)
                axis.plot(xs, ys, style, label=label, color=COLOURS.get(peer), markersize=4)
        axis.set_xscale("log")
        if WIDE * min(shown, default=1.0) < max(shown, default=1.0):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_xlabel(panel.x)
        axis.set_ylabel(panel.y)
        axis.grid(True, which="both", alpha=0.2)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(row.title, fontsize=10)
    figure.tight_layout()
    folder.mkdir(exist_ok=True)
    path = folder / f"{row.name}.png"
    # Without the version of matplotlib in it: the same figures give the same file.
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return path


def _points(panel: Panel, columns: dict[str, list[float | None]]) -> list[tuple[float, float]]:
    """Where the line of one peer goes: the medians of the figures that are there."""
    points = []
    for x, key in panel.points:
        known = [value for value in columns.get(key, []) if value is not None]
        if known:
            points.append((x, statistics.median(known)))
    return points
