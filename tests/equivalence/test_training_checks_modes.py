"""TrainingChecks with a fault on one of two ranks: all ranks stop with the same message, in every parallel mode."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from made_records import write_records
from side_by_side import ranks, run_all
from training_checks_worker import FAMILY, FAULTS_BY_MODE

MODES = ("ddp", "zero2", "zero3")
WORKER = Path(__file__).with_name("training_checks_worker.py")


@pytest.fixture(scope="module")
def ends(tiny, tmp_path_factory, forked_python: str) -> dict[str, dict]:
    """How every run ended, the same on both ranks."""
    folder = tmp_path_factory.mktemp("checks")
    data = write_records(folder / "data")
    (folder / "models").mkdir()
    (folder / "models" / FAMILY).symlink_to(tiny(FAMILY))
    paths = ["--checkpoints", str(folder / "models"), "--data", str(data), "--out", str(folder)]
    run_all(*ranks([forked_python, str(WORKER), *paths]))
    first, second = ((folder / f"checks-{rank}.json").read_text() for rank in range(2))
    firsts, seconds = json.loads(first), json.loads(second)
    assert {n: end["error"] for n, end in firsts.items()} == {n: end["error"] for n, end in seconds.items()}
    assert all(end["finite"] for end in (*firsts.values(), *seconds.values())), "an update that is not finite was made"
    return firsts


@pytest.mark.parametrize("mode", FAULTS_BY_MODE)
def test_too_many_nonfinite_steps_stop_every_rank_and_name_the_samples(ends, mode):
    end = ends[f"{mode}-nan_for_good"]
    assert end["error"].startswith("NonFiniteError: the loss was not finite in 3 steps in a row (2 to 4).")
    named = end["error"].partition("Samples of step 4: ")[2].partition(". Likely causes")[0].split("; ")
    # Four samples a step, the last two of them on rank 1, where the fault is.
    assert [name.partition("train.json, ")[2] for name in named] == ["record 14 (id 't14')", "record 15 (id 't15')"]
    assert [math.isfinite(loss) for loss in end["losses"]] == [True, False, False]


@pytest.mark.parametrize("mode", MODES)
def test_single_nonfinite_steps_are_left_out_and_the_run_goes_on(ends, mode):
    end = ends[f"{mode}-nan_now_and_then"]
    assert end["error"] is None
    assert [math.isfinite(loss) for loss in end["losses"]] == [True, False, False, True, False, True]
    reference = ends["ddp-nan_now_and_then"]["losses"]
    assert [end["losses"][i] for i in (0, 3, 5)] == pytest.approx([reference[i] for i in (0, 3, 5)], abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_part_that_does_not_learn_stops_every_rank(ends, mode):
    end = ends[f"{mode}-{FAULTS_BY_MODE[mode][2]}"]
    assert end["error"].startswith("DeadPartError: the vision tower should train")
    assert "--tune_vision false" in end["error"]
    assert len(end["losses"]) == 1, "raised before the second step is over"


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_that_cannot_write_costs_one_checkpoint(ends, mode):
    end = ends[f"{mode}-full_disk"]
    assert end["error"] is None
    assert len(end["losses"]) == 3
    assert end["saved"] == [1, 3]
    assert end["unsaved"] is None, "the last one could be written"


def test_a_part_of_one_rank_that_is_not_finite_is_not_saved(ends):
    end = ends["zero3-spoilt_part"]
    assert end["saved"] == [1]
    assert end["error"].startswith("NonFiniteError: the loss was not finite in 3 steps in a row (3 to 5).")
    assert "but the update of step 2 may be the cause" in end["error"]
