"""Chart geometry: histograms, curves and waveforms as canvas coordinates, drawn as SVG by the templates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 400, 200
"""Size of a canvas in its own units; pages show it at about this many pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 18, 10, 24
_MOST_BARS = 40
# Above this ratio of the largest to the smallest value, a linear axis hides the small ones.
_LOG_FROM = 10.0
# A logarithmic axis whose range is below this ratio gets ticks between powers of ten.
_FEW_POWERS = 200.0
# Curves with at most this many values get a dot per value.
_FEW = 30
# Maximum points of a polyline; the canvas resolves no more.
_COLUMNS = 300


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick of an axis: position and label."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a histogram and its label."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram.

    Attributes:
        title: what is counted.
        summary: one sentence on the values.
        bars: from left to right.
        across: ticks of the values.
        up: ticks of the counts.
        limit: position and label of a limit, None when it is out of range.
    """

    title: str
    summary: str
    bars: tuple[Bar, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    limit: Tick | None


def histogram(title: str, values: Sequence[int], noun: str, *, limit: int | None = None) -> Histogram | None:
    """The histogram of whole numbers; None without any.

    Args:
        title: what is counted.
        values: one per sample.
        noun: the unit of the values, in the plural.
        limit: drawn when it is within the range.
    """
    if not len(values):
        return None
    found = np.asarray(values)
    least, most = int(found.min()), int(found.max())
    width = max(math.ceil(nice_step(most - least + 1, _MOST_BARS // 2)), 1)
    first = least // width * width
    counts = np.bincount((found - first) // width)
    end = first + len(counts) * width
    highest = int(counts.max())
    x, y = _Scale(first, end, _LEFT, WIDTH - _RIGHT), _Scale(0, highest, HEIGHT - _BOTTOM, _TOP)
    bars = []
    for place, number in enumerate(counts.tolist()):
        start = first + place * width
        if number:
            span = f"{start:,}" if width == 1 else f"{start:,} to {start + width - 1:,}"
            left, top = x(start), y(number)
            size = (max(x(start + width) - left - 1, 0.8), HEIGHT - _BOTTOM - top)
            bars.append(Bar(round(left, 1), round(top, 1), round(size[0], 1), round(size[1], 1), f"{span}: {number:,}"))
    half = 0.5 if width == 1 else 0.0
    across = (Tick(x(value + half), _short(value)) for value in _whole_ticks(first, end - (width == 1)))
    middle, high = np.percentile(found, [50, 95])
    summary = f"median {middle:,.0f} {noun}, 95 % at most {high:,.0f}, from {least:,} to {most:,}"
    mark = Tick(x(limit), f"limit {limit:,}") if limit is not None and first <= limit <= end else None
    up = (Tick(y(value), _short(value)) for value in _whole_ticks(0, highest))
    return Histogram(title, summary, tuple(bars), tuple(across), tuple(up), mark)


def waveform(samples: np.ndarray, columns: int = 240) -> str:
    """The waveform of audio as the points of an SVG polygon on a canvas of ``columns`` x 100."""
    edges = np.linspace(0, len(samples), min(columns, len(samples)) + 1).astype(int)
    parts = [samples[first:last] for first, last in zip(edges[:-1], edges[1:], strict=True) if last > first]
    loudest = max(float(np.abs(samples).max()), 1e-6)
    step = columns / max(len(parts), 1)
    upper = [(place * step, 50 - 48 * float(part.max()) / loudest) for place, part in enumerate(parts)]
    lower = [(place * step, 50 - 48 * float(part.min()) / loudest) for place, part in enumerate(parts)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])


def nice_step(span: float, steps: int) -> float:
    """The least of 1, 2 and 5 times a power of ten of which at most ``steps`` cover ``span``.

    >>> nice_step(870, 5), nice_step(0.3, 5)
    (200, 0.1)
    """
    rough = span / max(steps, 1)
    power = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def wants_log(values: Sequence[float]) -> bool:
    """Whether to use a logarithmic axis: all values are positive and their range is large."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= _LOG_FROM


def smoothed(values: Sequence[float]) -> list[float]:
    """Weighted moving average; the result has the length of the input.

    The window is centred, so that the curve does not lag and keeps its ends.
    """
    reach = max(len(values) // 20, 1)
    kernel = 1 + reach - np.abs(np.arange(-reach, reach + 1))
    given = np.asarray(values, float)
    inside = slice(reach, reach + len(given))
    sums, weights = (np.convolve(each, kernel)[inside] for each in (given, np.ones(len(given))))
    return (sums / weights).tolist()


class _Scale:
    """Maps values to canvas coordinates."""

    def __init__(self, least: float, most: float, start: float, end: float, *, log: bool = False) -> None:
        self._log = log
        self._least, most = (math.log10(least), math.log10(most)) if log else (least, most)
        self._factor = (end - start) / ((most - self._least) or 1)
        self._start = start

    def __call__(self, value: float) -> float:
        return round(self._start + ((math.log10(value) if self._log else value) - self._least) * self._factor, 2)


def _whole_ticks(least: float, most: float, count: int = 5) -> list[int]:
    step = max(math.ceil(nice_step(most - least, count)), 1)
    return list(range(math.ceil(least / step) * step, math.floor(most) + 1, step))


def _short(value: float) -> str:
    """A short number with the suffix k, M, ...

    >>> [_short(value) for value in (0, 950, 12_000, 1_500_000)]
    ['0', '950', '12k', '1.5M']
    """
    for size, letter in ((1_000_000, "M"), (10_000, "k")):
        if abs(value) >= size:
            return f"{value / (1000 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


@dataclass(frozen=True, slots=True)
class Series:
    """A curve of a chart.

    Attributes:
        name: label with the last value.
        line: the points of an SVG polyline.
        pale: points of the raw values when ``line`` is smoothed; else empty.
        dots: positions of the values, when there are few.
    """

    name: str
    line: str
    pale: str
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Curves:
    """Curves over the steps of a run.

    Attributes:
        title: title of the chart.
        summary: one sentence on the curves.
        series: one per curve.
        across: ticks of the steps.
        up: ticks of the values.
        log: whether the axis of the values is logarithmic.
    """

    title: str
    summary: str
    series: tuple[Series, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    log: bool


Points = Sequence[tuple[int, float]]


def curves(title: str, given: Sequence[tuple[str, Points]], *, noisy: bool = True) -> Curves | None:
    """A chart of named curves, each of steps and finite values; None without any value.

    Args:
        title: title of the chart.
        given: the curves.
        noisy: whether curves of many values are smoothed and drawn over the raw values, and an axis with a large range
            is logarithmic.
    """
    named = [(name, found) for name, found in given if found]
    if not named:
        return None
    steps = [step for _, found in named for step, _ in found]
    values = [value for _, found in named for _, value in found]
    log = noisy and wants_log(values)
    least, most = (min(values), max(values)) if log else (min(0.0, *values), max(0.0, *values))
    first, last = min(steps), max(steps)
    x = _Scale(first, last, _LEFT, WIDTH - _RIGHT) if last > first else _Scale(first - 1, first + 1, _LEFT, WIDTH)
    y = _Scale(least, most, HEIGHT - _BOTTOM, _TOP, log=log)
    up = _log_ticks(least, most) if log else _ticks(least, most)
    return Curves(
        title,
        ", ".join(f"{name} {found[-1][1]:.4g}" for name, found in named) + f" at step {last:,}",
        tuple(_series(name, found, x, y, noisy) for name, found in named),
        tuple(Tick(x(step), _short(step)) for step in _whole_ticks(first, last)),
        tuple(Tick(y(value), _short(float(f"{value:.6g}"))) for value in up),
        log,
    )


def _series(name: str, found: Points, x: _Scale, y: _Scale, noisy: bool) -> Series:
    few = len(found) <= _FEW
    every = max(len(found) // _COLUMNS, 1)
    last = f"{name} {found[-1][1]:.4g}"
    dots = tuple((x(step), y(value)) for step, value in found) if few else ()
    thin = [point for start in range(0, len(found), 2 * every) for point in _ends(found[start : start + 2 * every])]
    if few or not noisy:
        return Series(last, _polyline(found if few else thin, x, y), "", dots)
    shown = [(step, value) for (step, _), value in zip(found, smoothed([value for _, value in found]), strict=True)]
    return Series(last, _polyline([*shown[::every], shown[-1]], x, y), _polyline(thin, x, y), ())


def _ends(found: Points) -> list[tuple[int, float]]:
    """Minimum and maximum in order, so that downsampling keeps peaks."""
    return sorted({min(found, key=lambda point: point[1]), max(found, key=lambda point: point[1])})


def _polyline(found: Points, x: _Scale, y: _Scale) -> str:
    return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in found)


def _ticks(least: float, most: float, count: int = 5) -> list[float]:
    step = nice_step((most - least) or 1, count)
    return [number * step for number in range(math.ceil(least / step), math.floor(most / step + 1e-9) + 1)]


def _log_ticks(least: float, most: float) -> list[float]:
    """Powers of ten; for a small range also 2 and 5 times them."""
    factors = (1, 2, 5) if most / least < _FEW_POWERS else (1,)
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    powers = powers[:: max(len(powers) // 6, 1)]
    return [found for power in powers for factor in factors if least <= (found := factor * 10.0**power) <= most]
