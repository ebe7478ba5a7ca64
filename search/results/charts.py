"""
Charts as numbers: everything in per cent of the plot, for a page that gives it whatever size it has.

By hand, because what plotting libraries write are pictures of one size and one colour scheme, or pages that need their
script; the report is one file that is read on a phone, in the dark, aloud and without a network.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np


# Of the labels at the ends of lines, in the unit of a chart's height.
LABEL_HEIGHT = 1.25


@dataclass(frozen=True)
class Axis:
    """
    A scale from values to per cent.

    Args:
        low, high (`float`): What lies at 0 and at 100 %; `low` may be the greater.
        log (`bool`): Whether the scale is logarithmic; both ends are positive then.
    """

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, in per cent; on a logarithmic scale, values below its end lie at the end."""
        if self.log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, self.low))
        else:
            low, high = self.low, self.high
        return round(100 * (value - low) / (high - low), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels of round values within the axis."""
        low, high = sorted((self.low, self.high))
        if self.log:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            values = [m * 10.0**k for k in decades for m in (1, 2, 5)]
        else:
            rough = (high - low) / 4
            power = 10.0 ** math.floor(math.log10(rough))
            step = power * min((1, 2, 5, 10), key=lambda m: abs(m * power - rough))
            values = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return [(self.at(value), f"{value:.6g}") for value in values if low <= value <= high]


@dataclass
class Line:
    """
    One line of a chart.

    Args:
        name (`str`): Untrusted text; shown at the line's end.
        role (`str`): "searched", "rival" or "other": how the page draws it.
        points: (x, y) in data units.
        whiskers: (x, low, high) in data units.
        joined, dotted (`bool`): Whether there is a line through the points, and a dot on each.
    """

    name: str
    role: str
    points: Sequence[tuple[float, float]]
    whiskers: Sequence[tuple[float, float, float]] = ()
    joined: bool = True
    dotted: bool = True


@dataclass(frozen=True)
class Chart:
    """
    Lines over two axes, as paths of an SVG whose view box is 0 0 100 100.

    Args:
        title (`str`): What it shows, for readers who do not see it.
        x, y (`Axis`): Every line ends at `x.high`, and has its label there.
        x_label, y_label (`str`): What is along them; without a label, y has no ticks either.
        lines (sequence of `Line`): In the order of importance.
        x_values (*optional*): What has a tick, if not round values.
        height (`float`): Of the plot, in rem.
    """

    title: str
    x: Axis
    y: Axis
    x_label: str
    y_label: str
    lines: Sequence[Line]
    x_values: Sequence[float] | None = None
    height: float = 20

    @property
    def description(self) -> str:
        """The chart in words and numbers."""
        sentences = [self.title]
        for line in (line for line in self.lines if line.dotted):
            values = [f"{y:.3g} at {x:.4g}" if line.joined else f"{x:.4g}" for x, y in line.points]
            sentences.append(f"{line.name}: {', '.join(values)}")
        return ". ".join(sentences) + "."

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        return self.x.ticks() if self.x_values is None else [(self.x.at(v), f"{v:g}") for v in self.x_values]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        return [(round(100 - place, 2), label) for place, label in self.y.ticks()] if self.y_label else []

    def path(self, line: Line) -> str:
        """Through the points."""
        return "M" + "L".join(self._place(*point) for point in line.points) if line.joined else ""

    def dots(self, line: Line) -> str:
        """Strokes of no length: with round caps they are dots, whatever the chart is stretched to."""
        return "".join(f"M{self._place(*point)}h0" for point in line.points) if line.dotted else ""

    def points(self, line: Line) -> list[tuple[float, float, str]]:
        """Places of the dots, in per cent from the left and the top, and what they say under a pointer."""
        if not line.dotted:
            return []
        said = [f"{line.name}: {y:.3g} at {x:.4g}" if line.joined else f"{line.name}: {x:.4g}" for x, y in line.points]
        places = [(self.x.at(x), round(100 - self.y.at(y), 2)) for x, y in line.points]
        return [(*place, text) for place, text in zip(places, said, strict=True)]

    def whiskers(self, line: Line) -> str:
        """Uprights from low to high."""
        return "".join(f"M{self._place(x, low)}L{self._place(x, high)}" for x, low, high in line.whiskers)

    def end(self, line: Line) -> float:
        """Where a line ends, in per cent from the top."""
        return round(100 - self.y.at(line.points[-1][1]), 2)

    def label_tops(self) -> list[float]:
        """Where the label of each line goes: as near to its end as may be without covering another."""
        gap = 100 * LABEL_HEIGHT / self.height
        order = sorted(range(len(self.lines)), key=lambda k: self.end(self.lines[k]))
        # Less i gaps, tops only have to be in order: isotonic regression, by pooling neighbours that are not.
        pools: list[list[float]] = []
        for i, k in enumerate(order):
            pools.append([self.end(self.lines[k]) - i * gap])
            while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
                pools[-2:] = [pools[-2] + pools[-1]]
        limit = 100 - gap * (len(order) - 1)
        tops = [min(max(fmean(pool), 0), limit) for pool in pools for _ in pool]
        return [round(tops[i] + i * gap, 2) for i in np.argsort(order)]

    def _place(self, x: float, y: float) -> str:
        return f"{self.x.at(x)} {round(100 - self.y.at(y), 2)}"
