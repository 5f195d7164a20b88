"""Choosing the checkpoint to resume from: complete, undamaged ones that match the run."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from made_checkpoints import checkpoint, sign, training
from safetensors.torch import save_file

from finetune.checkpoints.checkpoint_manager import rotate
from finetune.checkpoints.manifest import File, checkpoints, describe, fault, mark_doubtful, read, write
from finetune.checkpoints.pickle_check import ForeignCodeError
from finetune.checkpoints.resume import ResumeError, choose_checkpoint
from finetune.checkpoints.run_identity import RunIdentity
from finetune.export.zero_consolidation import read_shards
from finetune.utils.errors import CheckpointError

ZERO2 = {"zero_optimization": {"stage": 2}}
# A file of DeepSpeed, written by torch, and one of the Trainer.
PARTS = ("global_step/zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_state.pth")


def test_a_manifest_lists_every_file_and_is_the_last(tmp_path):
    folder = checkpoint(tmp_path, 3, zero_stage=2)
    found = read(folder)
    assert found is not None
    assert {"adapter_model.safetensors", "trainer_state.json", *PARTS} < set(found.files)
    assert (found.step, found.world_size, found.zero_stage, found.method) == (3, 1, 2, "lora")
    assert fault(folder, found) is None
    assert not list(folder.glob("*.tmp"))
    write(folder, 3, describe(training(tmp_path)))
    assert set(read(folder).files) == set(found.files), "a manifest does not list itself"  # pyright: ignore[reportOptionalMemberAccess]


def truncate(folder: Path) -> None:
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


DAMAGES = {
    "instead of ": truncate,
    "the content of optimizer.pt has changed": flip,
    "optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "no manifest.json: ": lambda folder: (folder / "manifest.json").write_text('{"format": 1, "fi'),
    "it has no manifest.json": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_an_incomplete_folder_is_passed_over_and_refused_by_name(tmp_path, caplog, reason):
    good, bad = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    assert choose_checkpoint(training(tmp_path), tmp_path) == bad
    DAMAGES[reason](bad)
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert choose_checkpoint(training(tmp_path), tmp_path) == good
    assert f"{bad} is not complete and is skipped" in caplog.text
    assert reason in caplog.text
    assert "(step 2)" in caplog.text
    with pytest.raises(ResumeError, match=r"checkpoint-4 is not a complete checkpoint"):
        choose_checkpoint(training(tmp_path, str(bad)), tmp_path)


def replaced(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5])


def not_finite(folder: Path) -> None:
    save_file({"a": torch.tensor([1.0, torch.nan])}, folder / "adapter_model.safetensors")


# Signed by whoever made them: the manifest matches.
UNUSABLE = {
    r"optimizer\.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    r"scheduler\.pt is missing": lambda folder: (folder / "scheduler.pt").unlink(),
    r"rng_state\.pth is missing": lambda folder: (folder / "rng_state.pth").unlink(),
    r"optimizer\.pt is damaged": cut("optimizer.pt"),
    r"trainer_state\.json is missing": lambda folder: (folder / "trainer_state.json").unlink(),
    r"trainer_state\.json is not valid JSON": cut("trainer_state.json"),
    r"trainer_state\.json is a list": replaced("trainer_state.json", "[]"),
    r"global_step 7, the manifest step 4": replaced("trainer_state.json", '{"global_step": 7}'),
    r"log_history is no list": replaced("trainer_state.json", '{"global_step": 4}'),
    r"adapter_model\.safetensors is missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    r"adapter_model\.safetensors is damaged": cut("adapter_model.safetensors"),
    r"adapter_model\.safetensors: a has values that are not finite": not_finite,
    r"adapter_config\.json is a list": replaced("adapter_config.json", "[]"),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_complete_folder_that_nothing_can_go_on_from(tmp_path, caplog, reason):
    bad = checkpoint(tmp_path, 4)
    UNUSABLE[reason](bad)
    sign(bad, 4, tmp_path)
    with pytest.raises(ResumeError, match=rf"cannot resume from .*checkpoint-4: .*{reason}.*--lora_weight_path"):
        choose_checkpoint(training(tmp_path, str(bad)), tmp_path)
    with pytest.raises(ResumeError, match=rf"no checkpoint in .* is resumable.*{reason}.*--overwrite_output_dir"):
        choose_checkpoint(training(tmp_path), tmp_path)
    good = checkpoint(tmp_path, 2)
    assert choose_checkpoint(training(tmp_path), tmp_path) == good
    assert "checkpoint-4 is not resumable and is skipped" in caplog.text


ZERO_FAULTS = {
    r"has 1 of 2 files \*_optim_states\.pt": lambda folder: next(folder.rglob("*rank_1*")).unlink(),
    r"has 0 of 1 files \*_model_states\.pt": lambda folder: next(folder.rglob("*model_states*")).unlink(),
    r"latest is missing": lambda folder: (folder / "latest").unlink(),
    r"names '\.\./other', which is no folder in it": replaced("latest", "../other"),
    r"the folder 'global_step9' .* is missing": replaced("latest", "global_step9"),
}


@pytest.mark.parametrize("reason", ZERO_FAULTS)
def test_parts_of_zero_that_are_missing(tmp_path, monkeypatch, reason):
    layout = {"zero_stage": 2, "world_size": 2}
    folder = checkpoint(tmp_path, 4, **layout)
    arguments = training(tmp_path, str(folder))
    arguments.deepspeed = ZERO2
    ZERO_FAULTS[reason](folder)
    sign(folder, 4, tmp_path, **layout)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ResumeError, match=reason):
        choose_checkpoint(arguments, tmp_path)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("wish", ["auto", "name"])
@pytest.mark.parametrize("name", ["optimizer.pt", "global_step/mp_rank_00_model_states.pt", "beside/some.bin"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, wish, name, legacy):
    checkpoint(tmp_path, 2)
    folder = checkpoint(tmp_path, 4)
    (folder / name).parent.mkdir(exist_ok=True)
    made = tmp_path / "made"
    torch.save({"module": Payload(made)}, folder / name, _use_new_zipfile_serialization=not legacy)
    sign(folder, 4, tmp_path)
    with pytest.raises(ForeignCodeError, match=f"{Path(name).name} is not read: .*run code"):
        choose_checkpoint(training(tmp_path, "auto" if wish == "auto" else str(folder)), tmp_path)
    assert not made.exists()


def test_parts_are_checked_before_they_are_consolidated(tmp_path):
    folder = checkpoint(tmp_path, 4, zero_stage=2)
    made = tmp_path / "made"
    torch.save({"module": Payload(made)}, folder / "global_step" / "mp_rank_00_model_states.pt")
    with pytest.raises(ForeignCodeError, match=r"_states\.pt is not read: unpickling it would import .*pathlib"):
        read_shards(folder, trained_only=True)
    assert not made.exists()
    (folder / "latest").write_text("/elsewhere")
    with pytest.raises(CheckpointError, match="not complete: the file 'latest' names '/elsewhere'"):
        read_shards(folder, trained_only=True)


def test_auto_without_a_checkpoint_starts(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert choose_checkpoint(training(tmp_path), tmp_path) is None
    assert f"no complete checkpoint in {tmp_path}: starting from the base" in caplog.text
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ResumeError, match="holds a finished result"):
        choose_checkpoint(training(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"), [(("none", "None", "false"), None), (("auto", "AUTO", "True"), "auto"), (("a/b",), "a/b")]
)
def test_the_words_of_the_flag(tmp_path, words, expected):
    for word in words:
        assert training(tmp_path, word).resume_from_checkpoint == expected


def test_a_path_is_checked(tmp_path):
    folder = checkpoint(tmp_path, 2)
    assert choose_checkpoint(training(tmp_path, str(folder)), tmp_path / "elsewhere") == folder
    with pytest.raises(ResumeError, match="no such folder"):
        choose_checkpoint(training(tmp_path, str(tmp_path / "checkpoint-9")), tmp_path)
    with pytest.raises(ResumeError, match=r"give one of its checkpoints, e\.g\. .*checkpoint-2"):
        choose_checkpoint(training(tmp_path, str(tmp_path)), tmp_path)
    assert choose_checkpoint(training(tmp_path, "none"), tmp_path) is None


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"resumable": False}, r"weights only \(--save_only_model true\).*--lora_weight_path .*checkpoint-2"),
        ({"resumable": False, "method": "full"}, r"weights only.*MODEL=.*checkpoint-2 and another OUTPUT_DIR"),
        ({"method": "full"}, "is of a full run, this is a lora run"),
        ({"zero_stage": 2, "world_size": 2}, "written with ZeRO-2, this run uses no ZeRO"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, layout, message):
    folder = checkpoint(tmp_path, 2, **layout)
    for wish in ("auto", str(folder)):
        with pytest.raises(ResumeError, match=message):
            choose_checkpoint(training(tmp_path, wish), tmp_path)


def test_another_way_to_make_batches_is_said(tmp_path, caplog):
    order = "--packing best_fit in 4096 tokens, --train_sampling_strategy random"
    folder = checkpoint(tmp_path, 2, order=order)
    assert choose_checkpoint(training(tmp_path), tmp_path) == folder
    assert f"batches were made with {order}, now it is --packing off, --train_sampling" in caplog.text


def test_another_number_of_processes(tmp_path, monkeypatch, caplog):
    folder = checkpoint(tmp_path, 2, zero_stage=3, world_size=4)
    for rank in range(1, 4):
        torch.save({}, folder / "global_step" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    sign(folder, 2, tmp_path, zero_stage=3, world_size=4)
    arguments = training(tmp_path)
    # Without starting DeepSpeed: only the stage of its configuration is read.
    arguments.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(
        ResumeError, match=r"written by 4 processes, this run has 1.*Start 4 processes.*lora_weight_path"
    ):
        choose_checkpoint(arguments, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert choose_checkpoint(arguments, tmp_path) == folder
    monkeypatch.delenv("WORLD_SIZE")
    shutil.rmtree(folder)
    folder = checkpoint(tmp_path, 2, world_size=4, batch_size=2)
    assert choose_checkpoint(training(tmp_path), tmp_path) == folder
    assert "was 8 = 2 per device x 4 processes x 1 accumulation, now it is 1 = 1 per device" in caplog.text


def edit(folder: Path, **values) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_newest_is_the_highest_step_whatever_the_clock_says(tmp_path):
    """A clock that was moved back leaves manifests from the future; none is taken again and again."""
    folders = [checkpoint(tmp_path, step) for step in (2, 3, 10)]
    edit(folders[0], written=json.loads((folders[0] / "manifest.json").read_text())["written"] + 3600)
    assert choose_checkpoint(training(tmp_path), tmp_path) == folders[2]
    rotate(tmp_path, 1, "r", None)
    assert [step for step, _ in checkpoints(tmp_path)] == [10]


def test_a_run_that_went_back_goes_on_with_what_it_made_there(tmp_path):
    """It resumed from an older checkpoint: what it left behind is not newer."""
    left = checkpoint(tmp_path, 8)
    now = RunIdentity()
    assert choose_checkpoint(training(tmp_path, str(checkpoint(tmp_path, 2))), tmp_path, now)
    assert (now.run, now.attempt) == ("r", 2)
    later = checkpoint(tmp_path, 3, attempt=now.attempt)
    assert choose_checkpoint(training(tmp_path), tmp_path) == later
    rotate(tmp_path, 1, "r", None)
    assert not left.exists()
    assert later.exists()


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
def test_a_hash_is_of_the_whole_file(tmp_path, size):
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "weights").write_bytes(content[:size])
    write(tmp_path, 1, describe(training(tmp_path)))
    found = read(tmp_path)
    assert found is not None
    assert found.files["weights"] == File(size, f"xxh3_128:{xxhash.xxh3_128_hexdigest(content[:size])}")


def test_checkpoints_of_another_run_are_neither_taken_nor_removed(tmp_path, caplog):
    other = checkpoint(tmp_path, 2, run="other")
    own = checkpoint(tmp_path, 4)
    assert choose_checkpoint(training(tmp_path), tmp_path) == own
    (own / "optimizer.pt").unlink()
    assert choose_checkpoint(training(tmp_path), tmp_path) is None
    assert f"{other} is of another run and is skipped" in caplog.text
    rotate(tmp_path, 1, "r", None)
    assert other.exists()


def test_format_1_is_read_and_goes_on_as_a_run_of_its_own(tmp_path, caplog):
    folder = checkpoint(tmp_path, 2)
    values = json.loads((folder / "manifest.json").read_text())
    assert values["format"] == 3
    assert values["files"]["optimizer.pt"]["digest"].startswith("xxh3_128:")
    older(folder, values)
    for name in ("run", "attempt", "base", "data", "flags", "versions", "doubt"):
        del values[name]
    (folder / "manifest.json").write_text(json.dumps({**values, "format": 1}))
    now = RunIdentity()
    assert choose_checkpoint(training(tmp_path), tmp_path, now) == folder
    assert "written by an older version: its base, data and flags are not compared" in caplog.text
    assert len(now.run) == 32
    newer = checkpoint(tmp_path, 3, run=now.run)
    assert choose_checkpoint(training(tmp_path), tmp_path) == newer
    (newer / "optimizer.pt").unlink()
    assert choose_checkpoint(training(tmp_path), tmp_path) == folder


def older(folder: Path, values: dict[str, Any]) -> None:
    """The files of a manifest as formats 1 and 2 have them."""
    for name, entry in values["files"].items():
        entry["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        del entry["digest"]


def test_sha256_of_format_2_is_compared(tmp_path):
    folder = checkpoint(tmp_path, 2)
    values = json.loads((folder / "manifest.json").read_text())
    older(folder, values)
    (folder / "manifest.json").write_text(json.dumps({**values, "format": 2}))
    assert choose_checkpoint(training(tmp_path), tmp_path) == folder
    flip(folder)
    assert (
        fault(folder, read(folder)) == "the content of optimizer.pt has changed since it was written (sha256 differs)"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"step": "2"},
        {"base": []},
        {"files": {"../x": {"bytes": 1, "digest": "xxh3_128:0"}}},
        {"files": {"x": {"bytes": 1, "digest": "crc32:0"}}},
        {"files": {"x": {"bytes": 1, "digest": 0}}},
    ],
)
def test_a_manifest_of_other_types_is_none(tmp_path, changed):
    folder = checkpoint(tmp_path, 2)
    edit(folder, **changed)
    assert read(folder) is None


def test_what_rotation_removes_first(tmp_path):
    for step in (1, 2, 3, 4, 5):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-9").mkdir()
    mark_doubtful(tmp_path / "checkpoint-5", "none of the 3 steps after it was finite")
    steps = []
    for limit in (5, 4, 3, 1):
        rotate(tmp_path, limit, "r", str(tmp_path / "checkpoint-1"))
        steps.append([step for step, _ in checkpoints(tmp_path)])
    assert steps == [[1, 2, 3, 4, 5], [1, 2, 3, 4], [1, 3, 4], [1, 4]], "unfinished, doubtful, old; the best stays"
