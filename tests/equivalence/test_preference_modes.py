"""Preference training in one process, with DDP, ZeRO-2 and ZeRO-3: the same reference, losses and gradients."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from made_records import write_pairs
from side_by_side import Command, ranks, run_all
from stack import PAIRED
from test_modes import LOSS, NORM, PART, WORKER, result

FAMILY = "o2_6"
MODES = ("ddp", "zero2", "zero3-0")
STEPS = 4


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory, forked_python: str) -> Path:
    """Text, images, videos and audio; both launches compute the reference themselves."""
    folder = tmp_path_factory.mktemp("preference")
    (folder / "models").mkdir()
    (folder / "models" / FAMILY).symlink_to(tiny(FAMILY))
    data = write_pairs(folder / "data", sound=True)
    paths = ["--checkpoints", str(folder / "models"), "--data", str(data), "--out", str(folder), "--families", FAMILY]
    paths += ["--kinds", *PAIRED, "--steps", str(STEPS), "--"]
    run_all(Command([forked_python, str(WORKER), *paths, "alone"], {"XDG_CACHE_HOME": str(folder / "one")}))
    run_all(*ranks([forked_python, str(WORKER), *paths, *MODES], XDG_CACHE_HOME=str(folder / "two")))
    return folder


@pytest.mark.parametrize("kind", PAIRED)
@pytest.mark.parametrize("mode", MODES)
def test_mode_equals_one_process(runs, mode, kind):
    ours, alone = result(runs, mode, FAMILY, kind), result(runs, "alone", FAMILY, kind)
    assert len(ours["steps"]) == len(alone["steps"]) == STEPS
    assert ours["steps"][0][0] == pytest.approx(math.log(2), abs=LOSS)
    for number, (step, expected) in enumerate(zip(ours["steps"], alone["steps"], strict=True), 1):
        assert step[0] == pytest.approx(expected[0], abs=LOSS), f"loss of step {number}"
        assert step[1] == pytest.approx(expected[1], rel=NORM), f"gradient norm of step {number}"
        assert step[2] == pytest.approx(expected[2], rel=PART, abs=NORM * step[1]), f"parts of step {number}"
    assert ours["eval"] == pytest.approx(alone["eval"], abs=LOSS)
    assert (ours["partitioned"] > 0) == mode.startswith("zero3")
