"""Which checkpoint a run goes on from: complete ones only, and only when it fits."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from finetune.arguments import TrainingArguments
from finetune.tuning import manifest as manifests
from finetune.tuning.manifest import ManifestCallback, checkpoints, describe, fault, read, write
from finetune.tuning.resume import ResumeError, choose_checkpoint

ZERO2 = {"zero_optimization": {"stage": 2}}


def training(output: Path, resume: str = "auto", **flags) -> TrainingArguments:
    options = {"use_cpu": True, "use_lora": True, "report_to": "none", "resume_from_checkpoint": resume, **flags}
    return TrainingArguments(output_dir=str(output), **options)


def checkpoint(output: Path, step: int, **layout) -> Path:
    """A made-up checkpoint folder, complete."""
    folder = output / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 100)
    (folder / "global_step" / "states.pt").write_bytes(bytes([step]) * 500)
    write(folder, step, {**describe(training(output)), **layout})
    return folder


def test_a_manifest_lists_every_file_and_is_the_last(tmp_path):
    folder = checkpoint(tmp_path, 3)
    found = read(folder)
    assert found is not None
    assert set(found.files) == {"adapter_model.safetensors", "global_step/states.pt"}
    assert (found.step, found.world_size, found.zero_stage, found.method) == (3, 1, 0, "lora")
    assert fault(folder, found) is None
    assert not list(folder.glob("*.tmp"))
    write(folder, 3, describe(training(tmp_path)))
    assert set(read(folder).files) == set(found.files), "a manifest does not list itself"  # pyright: ignore[reportOptionalMemberAccess]


def truncate(folder: Path) -> None:
    path = folder / "global_step" / "states.pt"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "global_step" / "states.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


DAMAGES = {
    "states.pt has 499 bytes instead of 500": truncate,
    "states.pt has other content": flip,
    "states.pt is missing": lambda folder: (folder / "global_step" / "states.pt").unlink(),
    "has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "no manifest.json: ": lambda folder: (folder / "manifest.json").write_text('{"format": 1, "fi'),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_an_incomplete_folder_is_passed_over_and_refused_by_name(tmp_path, caplog, reason):
    good, bad = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    assert choose_checkpoint(training(tmp_path), tmp_path) == bad
    DAMAGES[reason](bad)
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert choose_checkpoint(training(tmp_path), tmp_path) == good
    assert f"{bad} is not complete and is passed over" in caplog.text
    assert reason in caplog.text
    assert "(step 2)" in caplog.text
    with pytest.raises(ResumeError, match=rf"checkpoint-4 is not a complete checkpoint.*{reason.split()[-1]}"):
        choose_checkpoint(training(tmp_path, str(bad)), tmp_path)


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
    folder = checkpoint(tmp_path, 2, zero_stage=2, world_size=4)
    arguments = training(tmp_path)
    # Without starting DeepSpeed: only the stage of its configuration is read.
    arguments.deepspeed = ZERO2
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


def test_newest_is_what_was_written_last(tmp_path):
    """A run that went on from an older checkpoint is newer than the one it left."""
    checkpoint(tmp_path, 8)
    later = checkpoint(tmp_path, 6)
    assert choose_checkpoint(training(tmp_path), tmp_path) == later


def save(callback: ManifestCallback, arguments: TrainingArguments, step: int) -> None:
    folder = Path(arguments.output_dir or "") / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "weights").write_text(str(step))
    callback.on_save(arguments, TrainerState(global_step=step), TrainerControl())


def test_old_checkpoints_go_only_when_the_new_one_is_complete(tmp_path, monkeypatch):
    arguments = training(tmp_path, save_total_limit=1)
    callback = ManifestCallback()
    callback.on_train_begin(arguments, TrainerState(), TrainerControl())
    assert arguments.save_total_limit is None, "the Trainer would remove them before the manifest is written"
    save(callback, arguments, 1)
    save(callback, arguments, 2)
    assert [step for step, _ in checkpoints(tmp_path)] == [2]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manifests, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        save(callback, arguments, 3)
    assert choose_checkpoint(training(tmp_path), tmp_path) == tmp_path / "checkpoint-2"
    monkeypatch.undo()
    save(callback, arguments, 4)
    assert [step for step, _ in checkpoints(tmp_path)] == [4]
    callback.on_train_end(arguments, TrainerState(), TrainerControl())
    assert arguments.save_total_limit == 1


def test_the_best_and_the_unfinished(tmp_path):
    """The best checkpoint stays; an unfinished one goes before a complete one."""
    arguments = training(tmp_path, save_total_limit=2)
    callback = ManifestCallback()
    callback.on_train_begin(arguments, TrainerState(), TrainerControl())
    (tmp_path / "checkpoint-9").mkdir()
    for step in (1, 2):
        save(callback, arguments, step)
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2]
    (tmp_path / "checkpoint-3").mkdir()
    state = TrainerState(global_step=3, best_model_checkpoint=str(tmp_path / "checkpoint-1"))
    callback.on_save(arguments, state, TrainerControl())
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 3]


def test_manifests_are_json(tmp_path):
    values = json.loads((checkpoint(tmp_path, 2) / "manifest.json").read_text())
    assert values["format"] == 1
    assert len(values["files"]["global_step/states.pt"]["sha256"]) == 64
