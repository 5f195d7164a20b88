"""One process, DDP, ZeRO-2 and ZeRO-3 train alike, also when ranks have different media at every step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from made_records import EVALUATED, STEPS, write_media_records, write_records
from safetensors.torch import load_file
from side_by_side import Command, ranks, run_all
from stack import FAMILIES, KINDS, OTHERS, near
from variants import MIXTURE
from worker import BRIEF, MODES, PACKED, SHORT

WORKER = Path(__file__).with_name("worker.py")
# Measured: losses 2e-6, gradient norms 2e-6.
LOSS, NORM = 1e-5, 2e-5
PART = 1e-4
BRIEF_RUNS = [*((family, "full") for family in OTHERS), ("o4_5", "lora"), ("v4_7", "lora"), (MIXTURE, "experts")]
ADAPTED = [family for family, kind in BRIEF_RUNS if kind != "full"]
WEIGHTS = {"full": "model*.safetensors", "lora": "adapter_model.safetensors", "experts": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory, forked_python: str) -> Path:
    """The folder with the results of every mode: one launch of two ranks, one of a single process."""
    folder = tmp_path_factory.mktemp("equivalence")
    paths = prepare(folder, FAMILIES, tiny)
    run_all(
        *ranks([forked_python, str(WORKER), *paths, "--", *MODES]),
        Command([forked_python, str(WORKER), *paths, "--", "alone"]),
    )
    return folder


@pytest.fixture(scope="module")
def brief_runs(tiny, tmp_path_factory, forked_python: str) -> Path:
    """The same of the other generations: DDP and ZeRO-3, in full; adapters where the architecture differs."""
    folder = tmp_path_factory.mktemp("brief")
    paths = prepare(folder, OTHERS, tiny)
    run_all(*ranks([forked_python, str(WORKER), *paths, "--kinds", "full", "--", "ddp", "zero3-0"]))
    paths[paths.index("--families") :] = ["--families", *ADAPTED]
    run_all(*ranks([forked_python, str(WORKER), *paths, "--kinds", "lora", "experts", "--", "ddp", "zero3-0"]))
    return folder


# Family with video, whether it has audio, steps.
MEDIA = {"o4_5": (True, STEPS), "v4_5": (False, 6)}


@pytest.fixture(scope="module")
def media_runs(tiny, tmp_path_factory, forked_python: str) -> Path:
    """Text, images, videos and audio in one dataset, alone and in every mode."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "models").mkdir()
    for family, (sound, length) in MEDIA.items():
        (folder / "models" / family).symlink_to(tiny(family))
        data = write_media_records(folder / f"data-{family}", sound=sound, timelines=sound)
        paths = ["--checkpoints", str(folder / "models"), "--data", str(data), "--out", str(folder)]
        paths += ["--families", family, "--kinds", "full", "--steps"]
        alone = Command([forked_python, str(WORKER), *paths, str(length), "--", "alone"])
        run_all(*ranks([forked_python, str(WORKER), *paths, str(length), "--", *MEDIA_MODES]), alone)
        run_all(*ranks([forked_python, str(WORKER), *paths, str(BRIEF), "--", *PACKED_MODES]))
    return folder


MEDIA_MODES = ("ddp", "zero2", "zero3-0")
PACKED_MODES = tuple(f"{mode}{PACKED}" for mode in ("zero2", "zero3-0"))


def prepare(folder: Path, families: Sequence[str], tiny: Callable[[str], Path]) -> list[str]:
    """Writes the records and lays out the checkpoints; the worker's flags."""
    data = write_records(folder / "data")
    (folder / "models").mkdir()
    for family in families:
        (folder / "models" / family).symlink_to(tiny(family))
    where = ["--checkpoints", str(folder / "models"), "--data", str(data), "--out", str(folder)]
    return [*where, "--families", *families]


def result(runs: Path, mode: str, family: str, kind: str) -> dict:
    return json.loads((runs / f"results-{mode}-{family}-{kind}.json").read_text())


def assert_alike(ours: dict, other: dict, length: int) -> None:
    """Losses and gradient norms of every step; those of the parts are together the total norm."""
    assert len(ours["steps"]) == length
    for number, (step, expected) in enumerate(zip(ours["steps"], other["steps"][:length], strict=True), 1):
        assert step[0] == pytest.approx(expected[0], abs=LOSS), f"loss of step {number}"
        assert step[1] == pytest.approx(expected[1], rel=NORM), f"gradient norm of step {number}"
        assert len(step[2]) >= 2, f"norms per part of step {number}"
        assert math.hypot(*step[2].values()) == pytest.approx(step[1], rel=PART), f"parts of step {number}"
        assert step[2] == pytest.approx(expected[2], rel=PART, abs=NORM * step[1]), f"parts of step {number}"


def weights(runs: Path, mode: str, family: str, kind: str) -> dict[str, torch.Tensor]:
    files = (runs / f"{mode}-{family}-{kind}").glob(WEIGHTS[kind])
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_mode_equals_one_process(runs, mode, family, kind):
    ours, alone = result(runs, mode, family, kind), result(runs, "alone", family, kind)
    assert len(alone["steps"]) == (length := STEPS if kind == "full" else SHORT)
    assert_alike(ours, alone, length)
    loss, tokens = alone["eval"]
    assert ours["eval"][1] == tokens, f"{EVALUATED} samples: what pads the last batch is counted once"
    assert ours["eval"][0] == pytest.approx(loss, abs=LOSS)
    assert (ours["partitioned"] > 0) == mode.startswith("zero3")


@pytest.mark.parametrize("mode", MEDIA_MODES)
@pytest.mark.parametrize("family", MEDIA)
def test_mixed_media_train_alike_in_every_mode(media_runs, mode, family):
    ours, alone = result(media_runs, mode, family, "full"), result(media_runs, "alone", family, "full")
    assert len(alone["steps"]) == MEDIA[family][1]
    assert_alike(ours, alone, MEDIA[family][1])
    assert ours["eval"] == pytest.approx(alone["eval"], abs=LOSS)


@pytest.mark.parametrize("mode", PACKED_MODES)
@pytest.mark.parametrize("family", MEDIA)
def test_packed_and_balanced_they_train_alike_too(media_runs, mode, family):
    ours, alone = result(media_runs, mode, family, "full"), result(media_runs, "alone", family, "full")
    assert_alike(ours, alone, BRIEF)


@pytest.mark.parametrize(("family", "kind"), BRIEF_RUNS)
def test_zero3_equals_ddp_in_every_generation(brief_runs, family, kind):
    ours, ddp = result(brief_runs, "zero3-0", family, kind), result(brief_runs, "ddp", family, kind)
    assert len(ddp["steps"]) == BRIEF
    assert_alike(ours, ddp, BRIEF)
    assert ours["eval"] == pytest.approx(ddp["eval"], abs=LOSS)
    assert ours["partitioned"] > 0
    assert ours["leaves"] == (2 if family == MIXTURE else 0), "blocks of experts that ZeRO-3 takes for one module"
    gathered, whole = weights(brief_runs, "zero3-0", family, kind), weights(brief_runs, "ddp", family, kind)
    assert gathered.keys() == whole.keys()
    assert [name for name, expected in whole.items() if not near(gathered[name], expected)] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_saved_weights_are_complete_and_equal(runs, tiny, mode, family, kind):
    ours, alone = weights(runs, mode, family, kind), weights(runs, "alone", family, kind)
    assert ours.keys() == alone.keys()
    for name, expected in alone.items():
        assert expected.numel() > 0, name
        assert ours[name].shape == expected.shape, name
        assert near(ours[name], expected), name
    if kind == "full":
        base = load_file(tiny(family) / "model.safetensors")
        assert {name: tensor.shape for name, tensor in ours.items()} == {n: tensor.shape for n, tensor in base.items()}
        moved = {name.partition(".")[0] for name in base if not torch.equal(ours[name].float(), base[name].float())}
        assert moved == {"llm", "vpm", "resampler"}
    else:
        # They start at zero.
        assert all(tensor.any() for name, tensor in ours.items() if "lora_B" in name)
