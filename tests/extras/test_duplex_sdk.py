"""Records of minicpm-o5-sdk: its own cases token by token, what it refuses, its tokenizers, and a whole run."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import minicpm_o5_sdk as sdk
import pytest
import torch
from minicpm_o5_sdk.tokenizers import load_builtin_tokenizer
from safetensors.torch import load_file

import finetune.models  # noqa: F401  first: it registers a tokenizer under the name that the package loads
from finetune import duplex_sdk
from finetune.commands.check import main as check
from finetune.commands.evaluate import main as evaluate
from finetune.encoding.encoder import Encoder
from finetune.readers import read
from finetune.sample import DataError, Sample
from finetune.templates.duplex_fc import FIRST_ID, NEW_TOKENS, PUBLISHED_IDS
from finetune.tokenizers.tokenization import load_tokenizer
from finetune.utils.errors import UserError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from published_vocabulary import write_published_size  # noqa: E402
from sounds import write_wav  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "duplex"
CASES = Path(str(resources.files("minicpm_o5_sdk"))) / "visualizers" / "duplex" / "guidebook" / "cases" / "exported"


VIDEO = {
    "segments": [
        {
            "video": {"__class__": "O5LazyVideo", "duration_sec": 1.0, "file_path": "a.mp4"},
            "start_trigger": {"refs": [{"type": "global", "offset_sec": 0.0}], "mode": "immediate"},
        }
    ]
}


def variants() -> Iterator[tuple[Any, str]]:
    for case in sdk.list_case_ids():
        for variant in sdk.list_case_variants(case):
            yield case, variant.variant_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny o 4.5 with the published vocabulary."""
    from finetune.tiny.checkpoint_writer import write_tiny_checkpoint

    place = tmp_path_factory.mktemp("model")
    return write_published_size(write_tiny_checkpoint("o4_5", place / "tiny"), place / "o4_5")


@pytest.fixture(scope="module")
def encoders(folder: Path) -> dict[str, Encoder]:
    from finetune.checkpoints.base_checkpoint import resolve_base

    base = resolve_base(str(folder))
    return {
        name: Encoder(base.family, load_tokenizer(folder, duplex_prompt=name), base.settings, duplex=name)
        for name in ("native", "o45_fc")
    }


def read_one(record: Any, place: Path) -> Sample:
    (place / "d.json").write_text(json.dumps([record]))
    return read(place / "d.json", image_root=CASES)[0]


def test_every_built_in_case_token_by_token(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    """With the package's own tokenizer, loaded after finetune.models."""
    count = native = 0
    for case, variant in variants():
        wanted = sdk.load_case(case, variant_id=variant).prepare_training_material(tokenizer_id="o45_fc").llm
        sample = read_one(sdk.load_case_structure(case, variant_id=variant), tmp_path)
        example = encoders["o45_fc"].encode(sample)
        assert example.input_ids.tolist() == wanted.input_ids
        assert example.labels.tolist() == wanted.labels
        assert [mel.shape[1] for mel in example.audio] == [100] * len(wanted.unit_spans)
        count += 1
        assert sample.timeline is not None
        if sample.timeline.unsupported:
            with pytest.raises(DataError, match="--duplex_prompt o45_fc"):
                encoders["native"].encode(sample)
        else:
            encoders["native"].encode(sample)
            native += 1
    assert (count, native) == (38, 17)


def test_user_audio_lies_where_the_package_puts_it(tmp_path: Path) -> None:
    from finetune.media import audio

    for case, variant in [("case_1_01", "unit_front_boundary"), ("case_1_05", "canonical")]:
        wanted = sdk.load_case(case, variant_id=variant).build_user_audio_tensor(tokenizer_id="o45_fc")
        (track,) = read_one(sdk.load_case_structure(case, variant_id=variant), tmp_path).media("audio")
        heard = audio.load(track)
        assert len(heard) == wanted.samples.numel()
        # Another decoder of Opus: the same sound, not the same samples.
        assert ((heard - wanted.samples.numpy()) ** 2).mean() < 0.02 * (wanted.samples.numpy() ** 2).mean()


def test_the_stored_records_are_what_the_package_gives() -> None:
    records, stored = (json.loads((GOLDEN / name).read_text()) for name in ("records.json", "o45_fc.json"))
    for record, wanted in zip(records, stored, strict=True):
        placed = duplex_sdk.align_record(record)
        assert list(placed.prepared.ids) == wanted["ids"]
        assert list(placed.prepared.labels) == wanted["labels"]
        assert placed.units == wanted["units"]
        assert [[turn.text, [list(word) for word in turn.words]] for turn in placed.turns] == wanted["turns"]


def test_its_tokens_are_ours() -> None:
    tokenizer = load_builtin_tokenizer("o45_fc")
    assert [tokenizer.id_to_token(FIRST_ID + number) for number in range(len(NEW_TOKENS))] == list(NEW_TOKENS)
    names = {"<unk>": "<|image_placeholder|>", "<|audio|>": "<|audio_placeholder|>"}
    names |= {"<|turn_eos|>": "<|spoken_turn_eos|>", "<|chunk_eos|>": "<|spoken_slot_eos|>"}
    for token, number in PUBLISHED_IDS.items():
        assert tokenizer.token_to_id(names.get(token, token)) == number


def test_no_remote_code_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("remote code")

    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_from_dynamic_module", refuse)
    monkeypatch.setattr("transformers.models.auto.tokenization_auto.get_class_from_dynamic_module", refuse)
    duplex_sdk._tokenizer.cache_clear()
    assert duplex_sdk.align_record(json.loads((GOLDEN / "records.json").read_text())[0]).units == 4


def test_its_other_target_does_not_load() -> None:
    """The reason that --duplex_prompt o5 gives; with a transformers that loads it, the reason has to go."""
    major, minor, *_ = metadata.version("transformers").split(".")
    assert (int(major), int(minor)) >= (5, 23)
    with pytest.raises(ValueError, match="Qwen3_5Tokenizer"):
        load_builtin_tokenizer("o5")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["tracks"].update(speed=1), r"tracks.speed: Extra inputs are not permitted"),
        (lambda r: spoken(r).pop("alignment"), r"tracks.ai_spoken.segments.0.alignment: Field required"),
        (lambda r: spoken(r).update(text="No."), r"tracks.ai_spoken.segments.0: values that disagree"),
        (lambda r: spoken(r)["start_trigger"]["refs"][0].update(segment_index=9), r"ai_spoken\[0\]..*user_audio\[9\]"),
        (lambda r: spoken(r)["audio"].update(duration_sec=-1), "audio must have a duration above 0"),
        (lambda r: r["system"]["segments"][0].update(text="<|endoftext|>"), "<|endoftext|>"),
        (lambda r: r["unit_policy"].update(unit_sec=0.5), r": unit_policy.unit_sec is 0.5; only units of 1.0 second"),
        (lambda r: r["tracks"].update(user_video=VIDEO), r": tracks.user_video has segments, whose files"),
        (lambda r: r["tracks"].update(user_audio=b"RIFF"), "has a value that no JSON of minicpm-o5-sdk has"),
        (lambda r: r.update(speed=1), "has the key 'speed', which is not read in a record of minicpm-o5-sdk"),
        (lambda r: heard(r)["audio"].update(file_path="missing.wav"), "audio 'missing.wav' does not exist"),
        (lambda r: heard(r)["audio"].pop("file_path"), r"tracks.user_audio.segments\[0\] has no file_path"),
    ],
)
def test_mistakes_name_record_and_place(change: Callable[[Any], Any], said: str, tmp_path: Path) -> None:
    record = json.loads((GOLDEN / "records.json").read_text())[0]
    write_wav(tmp_path / "ask.wav", 1.5)
    change(record)
    (tmp_path / "d.json").write_text("[{}]")
    with pytest.raises(DataError, match=said) as caught:
        read(tmp_path / "d.json", records=[record], data_format="duplex", image_root=CASES)[0]
    assert "d.json, record 0 (id 'made-up-1')" in str(caught.value)


def test_what_the_package_only_reports_is_a_note(tmp_path: Path) -> None:
    record = json.loads((GOLDEN / "records.json").read_text())[1]
    for name in ("ask.wav", "voice.wav"):
        write_wav(tmp_path / name, 1.5)
    record["tracks"]["ai_non_spoken"]["segments"][0]["content"]["text"] = "Then <|listen|>."
    assert any("minicpm-o5-sdk reports payload_contains" in note for note in read_one(record, tmp_path).notes)


def spoken(record: Any) -> Any:
    return record["tracks"]["ai_spoken"]["segments"][0]


def heard(record: Any) -> Any:
    return record["tracks"]["user_audio"]["segments"][0]


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplex_sdk.metadata, "version", lambda _: "0.0.5")
    duplex_sdk._package.cache_clear()
    with pytest.raises(UserError, match=r"0.0.5 is installed, and 0.0.6 is needed: versions give other ids"):
        duplex_sdk._package()
    monkeypatch.undo()
    duplex_sdk._package.cache_clear()


@pytest.fixture(scope="module")
def flags(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Flags of a run on eight records."""
    place = tmp_path_factory.mktemp("data")
    for name, seconds in {"ask.wav": 1.5, "voice.wav": 1.0}.items():
        write_wav(place / name, seconds)
    records = json.loads((GOLDEN / "records.json").read_text())
    (place / "d.json").write_text(json.dumps(records * 4))
    given = {"model_name_or_path": folder, "data_path": place / "d.json", "duplex_prompt": "o45_fc", "max_steps": 3}
    given |= {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": "true"}
    given |= {"model_max_length": 1024, "check_base_loss": "off", "train_sampling_strategy": "sequential"}
    return given | {"dataloader_num_workers": 0, "unit_loss_weights": "yield=5", "per_device_train_batch_size": 2}


LORA = {"use_lora": "true", "lora_r": 4, "lora_dropout": 0}
FULL = {"tune_llm": "true", "tune_vision": "false", "tune_resampler": "false"}


def train(out: Path, flags: dict[str, Any], processes: int = 1) -> str:
    """Runs finetune.py; returns what it printed, with the verdict of the process that verified."""
    several = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    given = [f"--{name}={value}" for name, value in {**flags, "output_dir": out}.items()]
    command = [sys.executable, *several, "finetune.py", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "verified=true" in done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An adapter with its checkpoints, and what its run printed."""
    out = tmp_path_factory.mktemp("out")
    return out, train(out, {**flags, **LORA, "save_steps": 1})


def test_a_run_from_records_to_a_verified_adapter(
    trained: tuple[Path, str], flags: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Training reads the records by the package, adds the rows, and verifies what it saved in a new process."""
    out, printed = trained
    assert "24 rows added" in printed
    assert "<|no_action|>" in printed
    assert "duplex_sdk: 0.0.6" in (out / "run.yaml").read_text()
    size = (out / "checkpoint-1" / "adapter_model.safetensors").stat().st_size
    assert size < 1_000_000  # not all of the embeddings
    data = ["--data", str(flags["data_path"])]
    words = ["--model", str(out), "--compare", "base", *data, "--out", str(tmp_path), "--limit", "2"]
    assert evaluate([*words, "--dtype", "float32", "--device", "cpu"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["prompt"], metrics["minicpm_o5_sdk"]) == ("o45_fc", "0.0.6")
    assert "decision_accuracy" in metrics["base"]
    page = tmp_path / "page.html"
    assert check(["--model", str(folder), *data, "--duplex_prompt", "o45_fc", "--html", str(page)]) == 0
    assert "<ai_non_spoken_slot>" in html.unescape(page.read_text())


def test_resumed_and_zero_2_are_one_run(trained: tuple[Path, str], flags: dict[str, Any], tmp_path: Path) -> None:
    expected = load_file(trained[0] / "adapter_model.safetensors")
    again = {**flags, **LORA, "resume_from_checkpoint": trained[0] / "checkpoint-1", "save_strategy": "no"}
    train(tmp_path / "resumed", again)
    resumed = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    halved = {"per_device_train_batch_size": 1, "save_strategy": "no", "deepspeed": "ds_config_zero2.json"}
    train(tmp_path / "zero2", {**flags, **LORA, **halved}, processes=2)
    zero2 = load_file(tmp_path / "zero2" / "adapter_model.safetensors")
    assert expected.keys() == zero2.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(zero2[name], tensor, rtol=1e-3, atol=1e-4)


def test_zero_3_in_full_is_one_process(flags: dict[str, Any], tmp_path: Path) -> None:
    losses = []
    for name, more, processes in (
        ("one", {}, 1),
        ("zero3", {"per_device_train_batch_size": 1, "deepspeed": "ds_config_zero3.json"}, 2),
    ):
        train(tmp_path / name, {**flags, **FULL, **more, "save_strategy": "no", "logging_steps": 1}, processes)
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
        assert json.loads((tmp_path / name / "config.json").read_text())["vocab_size"] == 151_772
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
