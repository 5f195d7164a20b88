"""Numbers of charts."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.pages.charts import HEIGHT, WIDTH, histogram, smoothed, wants_log, waveform


@pytest.mark.parametrize("values", [[0], [5, 5, 5], list(range(1000)), [1, 10**6], [0, 2**31], [3] * 7 + [4] * 2])
@pytest.mark.parametrize("limit", [None, 5, 2048])
def test_every_value_is_in_a_bar_and_every_bar_on_the_canvas(values, limit):
    chart = histogram("t", values, "tokens", limit=limit)
    assert chart is not None
    assert sum(int(bar.text.rpartition(": ")[2].replace(",", "")) for bar in chart.bars) == len(values)
    for bar in chart.bars:
        assert 0 <= bar.x < bar.x + bar.width <= WIDTH
        assert 0 <= bar.y < bar.y + bar.height <= HEIGHT
    marks = [*chart.across, *([chart.limit] if chart.limit else [])]
    assert all(0 <= mark.at <= WIDTH for mark in marks)
    assert len(chart.bars) <= 60
    assert (chart.limit is not None) == (limit is not None and min(values) <= limit <= max(values) + 1)


def test_nothing_makes_no_chart():
    assert histogram("t", [], "tokens") is None


@pytest.mark.parametrize("count", [1, 2, 3, 50, 1001])
def test_smoothing_keeps_the_length_the_level_and_a_straight_line(count):
    assert smoothed([2.5] * count) == pytest.approx([2.5] * count)
    line = [3.0 - 0.01 * step for step in range(count)]
    middle = slice(count // 10, count - count // 10)
    assert smoothed(line)[middle] == pytest.approx(line[middle], abs=0.011)
    noise = np.random.default_rng(0).normal(size=count).tolist()
    assert np.std(smoothed(noise)) <= np.std(noise)


def test_a_logarithmic_axis_needs_positive_values_far_apart():
    assert wants_log([0.1, 1.0])
    assert not wants_log([0.2, 1.0])
    assert not wants_log([0.0, 1.0])
    assert not wants_log([])


@pytest.mark.parametrize("count", [1, 10, 100_000])
def test_the_outline_of_sound_stays_on_its_canvas(count):
    points = [tuple(map(float, point.split(","))) for point in waveform(np.linspace(-1, 1, count)).split()]
    assert all(0 <= x <= 240 and 0 <= y <= 100 for x, y in points)
    assert waveform(np.zeros(count)).split()
