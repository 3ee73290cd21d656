"""What a row is made of: the description that the harness and the report work from."""

from __future__ import annotations

from dataclasses import dataclass, replace

BASELINE = "multiprocessing"
FLOOR = "floor"
COUNTED = ("tasks/s", "messages/s")  # units whose figures are printed with k and M


@dataclass(frozen=True)
class Metric:
    """One column: the key that the measurement yields, its heading and its unit."""

    key: str
    title: str
    unit: str
    ratio: bool = True  # whether a column with the ratio to the baseline follows
    more: bool = False  # more is better, which else the unit says

    @property
    def more_is_better(self) -> bool:
        return self.more or self.unit in (*COUNTED, "GB/s")


@dataclass(frozen=True)
class Case:
    """What one child process measures. `quick`: whether a quick run includes it."""

    name: str
    metrics: tuple[Metric, ...]
    quick: bool = True
    peers: tuple[str, ...] = ()  # as those of a row, for this case
    title: str = ""  # what its metrics have in common


@dataclass(frozen=True)
class Panel:
    """One drawing of a row's plot: a line for each peer."""

    x: str
    y: str
    points: tuple[tuple[float, str], ...]  # a place on the x axis, and the metric that is there


@dataclass(frozen=True)
class Row:
    """One table of the report."""

    name: str
    title: str
    text: str
    cases: tuple[Case, ...]
    floor: str | None = None
    against_floor: bool = False  # a ratio to the floor stands beside the one to the baseline
    starts: bool = False  # the start method matters, so multiprocessing's spawn is measured too
    peers: tuple[str, ...] = ()  # only these, if it cannot be all; one's own are measured too
    tall: bool = False  # a line for each metric, and the peers side by side
    seconds: float = 1.0  # that a measurement is told to spend
    deadline: float | None = None  # seconds for one measurement, if the usual ones are too few
    panels: tuple[Panel, ...] = ()  # of its plot, if it has one

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The columns; their headings say which case they are of."""
        return tuple(
            replace(metric, title=f"{case.title}, {metric.title}") if case.title else metric
            for case in self.cases
            for metric in case.metrics
        )


def single(
    key: str, title: str, unit: str, *, quick: bool = True, peers: tuple[str, ...] = ()
) -> Case:
    """Return a case of one figure, named as its metric is."""
    return Case(key, (Metric(key, title, unit),), quick, peers)
