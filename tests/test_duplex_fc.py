"""The full-duplex prompt o45_fc without the package: ids as stored, sound of single seconds, 24 rows saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel
from published_vocabulary import write_published_size
from safetensors import safe_open
from sounds import write_wav

from finetune.arguments.model import LoraArguments
from finetune.checkpoints.base_checkpoint import BaseCheckpoint, resolve_base
from finetune.checkpoints.saving import finish_adapter, finish_full
from finetune.commands.export import main as export
from finetune.data_check.decision_counts import counted
from finetune.encoding.collate import pack, pad
from finetune.encoding.encoder import Encoder
from finetune.encoding.example import Example
from finetune.evaluation.duplex_results import RecordResult, results_of, scores_of
from finetune.media import audio
from finetune.model_folders.duplex_prompt import prompt_of
from finetune.models import load_model
from finetune.models.duplex_rows import add_duplex_rows
from finetune.sample import DataError, Media, Message, Sample, Source, Text, Track
from finetune.templates.duplex import generated_units
from finetune.templates.duplex_fc import FIRST_ID, LAST_ID, NEW_TOKENS
from finetune.timeline import PreparedIds, SpokenTurn, Timeline
from finetune.tokenizers.tokenization import load_tokenizer
from finetune.training.freezing import part_rows
from finetune.training.lora import add_lora
from finetune.utils.errors import CheckpointError, UserError

GOLDEN = Path(__file__).parent / "golden" / "duplex" / "o45_fc.json"
AUDIO_PLACE = 151_698


@pytest.fixture(scope="module")
def folder(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published_size(tiny("o4_5"), tmp_path_factory.mktemp("published") / "o4_5")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseCheckpoint:
    return resolve_base(str(folder), duplex_prompt="o45_fc")


@pytest.fixture(scope="module")
def encoder(base: BaseCheckpoint) -> Encoder:
    tokenizer = load_tokenizer(base.folder, duplex_prompt=base.duplex_name)
    return Encoder(base.family, tokenizer, base.settings, duplex=base.duplex_name)


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Two records as minicpm-o5-sdk gives them: speech alone; and thinking, a tool call and a reference voice."""
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def samples(records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    place = tmp_path_factory.mktemp("sound")
    ask, voice = write_wav(place / "ask.wav", 1.5), write_wav(place / "voice.wav", 1.0, pitch=220)
    return [_sample(number, given, ask, voice) for number, given in enumerate(records)]


def _sample(number: int, given: dict[str, Any], ask: Path, voice: Path) -> Sample:
    clips = tuple((start, Media("audio", ask)) for start, _ in given["user"])
    track = Track(clips, given["units"], fixed=True, samples=tuple(count for _, count in given["user"]))
    turns = tuple(SpokenTurn(text, tuple(map(tuple, words))) for text, words in given["turns"])
    prepared = PreparedIds(tuple(given["ids"]), tuple(given["labels"]))
    system = (Text("Use the lamp."), Media("audio", voice)) if number else (Text("Answer briefly."),)
    messages = (
        Message("system", system),
        Message("user", (Media("audio", track),)),
        Message("assistant", tuple(Text(turn.text) for turn in turns), train=True),
    )
    timeline = Timeline(turns, prepared=prepared, unsupported=tuple(given["beyond"]))
    return Sample(str(number), Source("made.json", number), messages, timeline=timeline)


@pytest.fixture(scope="module")
def examples(encoder: Encoder, samples: list[Sample]) -> list[Example]:
    return [encoder.encode(sample) for sample in samples]


def test_ids_and_labels_are_those_of_the_package(examples: list[Example], records: list[dict[str, Any]]) -> None:
    first, second = examples
    assert first.input_ids.tolist() == records[0]["ids"]
    assert first.labels.tolist() == records[0]["labels"]
    # The reference voice of one second has ten places, between tokens that stand side by side in the stored ids.
    place = records[1]["ids"].index(151_697) + 1
    ids, labels = second.input_ids.tolist(), second.labels.tolist()
    assert ids[place : place + 10] == [AUDIO_PLACE] * 10
    assert ids[:place] + ids[place + 10 :] == records[1]["ids"]
    assert labels[:place] + labels[place + 10 :] == records[1]["labels"]
    assert second.audio_bound[0].tolist() == [place, place + 10]
    assert [len(example.audio_bound) for example in examples] == [4, 8]


def test_every_second_is_a_clip_of_its_own(
    folder: Path, encoder: Encoder, samples: list[Sample], examples: list[Example]
) -> None:
    assert [mel.shape[1] for mel in examples[0].audio] == [100] * 4
    (track,) = samples[0].media("audio")
    model: Any = load_model(folder).eval()
    batch = pad(examples[:1], encoder.pad_id)
    with torch.no_grad():
        together = model.get_audio_embeds(batch["audio_features"], batch["audio_lengths"])
        for second in range(4):
            wave = audio.load(track)[16_000 * second :][:16_000].copy()
            alone = Message("user", (Media("audio", wave), Text("?")))
            clip = encoder.encode(Sample("clip", Source("clip", 0), (alone,)), generate=True)
            own = pad([clip], encoder.pad_id)
            single = model.get_audio_embeds(own["audio_features"], own["audio_lengths"])
            torch.testing.assert_close(together[10 * second :][:10], single)


def test_packed_is_padded(folder: Path, encoder: Encoder, examples: list[Example]) -> None:
    model = load_model(folder).eval()
    add_duplex_rows(model)
    with torch.no_grad():
        padded, packed = (model(**batch).loss.item() for batch in (pad(examples, encoder.pad_id), pack(examples)))
    assert packed == pytest.approx(padded, rel=1e-5)


def test_decisions_are_those_of_the_spoken_slot(encoder: Encoder, examples: list[Example]) -> None:
    units = generated_units(examples[0].input_ids.tolist(), examples[0].labels.tolist(), encoder.prompt_tokenizer)
    assert [(unit.speaks, unit.begins, unit.ends) for unit in units] == [
        (False, False, False),
        (True, True, False),
        (True, False, False),
        (True, False, True),  # the audio of the turn is longer than its text
    ]
    assert counted(units) == (4, 3, 1, 0)
    ids, labels = examples[1].input_ids.tolist(), examples[1].labels.tolist()
    assert len(generated_units(ids, labels, encoder.prompt_tokenizer)) == 7


def test_only_decisions_are_evaluated(
    folder: Path, encoder: Encoder, samples: list[Sample], examples: list[Example]
) -> None:
    model = load_model(folder)
    add_duplex_rows(model)
    results = list(results_of(model, encoder, samples, 20))
    assert [len(result.decisions) for result in results] == [4, 7]
    assert [result.played for result in results] == [None, None]
    assert RecordResult.from_text(results[0].to_text()) == results[0]
    scores = scores_of(samples, results)
    assert {"decision_accuracy", "start_margin", "turn_end_accuracy"} <= set(scores)
    assert "cer" not in scores
    # Weights of decisions are those of the spoken slot.
    weighted = Encoder(
        encoder.family,
        encoder.tokenizer,
        resolve_base(str(folder)).settings,
        duplex="o45_fc",
        unit_weights={"speak": 3.0},
    ).encode(samples[0])
    assert weighted.loss_weights is not None
    speak = encoder.prompt_tokenizer.control("<|speak|>")
    assert weighted.input_ids[weighted.loss_weights == 3].tolist() == [speak] * 3


def test_the_native_prompt_takes_records_of_speech_alone(folder: Path, samples: list[Sample]) -> None:
    base = resolve_base(str(folder))
    native = Encoder(base.family, load_tokenizer(base.folder), base.settings)
    example = native.encode(samples[0])
    text = native.tokenizer.decode(example.labels[example.labels >= 0])
    assert text == ("<|listen|><|speak|>Yes, the light<|chunk_eos|><|speak|> is on.<|turn_eos|><|chunk_eos|><|listen|>")
    with pytest.raises(DataError, match=r"record 1.*: has tools, events, thinking, tool calls.*--duplex_prompt o45_fc"):
        native.encode(samples[1])


def test_plain_timelines_and_other_vocabularies_are_refused(
    encoder: Encoder, samples: list[Sample], tiny: Callable[[str], Path]
) -> None:
    plain = replace(samples[0], timeline=Timeline(()))
    with pytest.raises(DataError, match=r"record 0: is a timeline of seconds .* takes records of minicpm-o5-sdk alone"):
        encoder.encode(plain)
    with pytest.raises(CheckpointError, match="published vocabulary of 151748 rows, .* has vocab_size 640"):
        resolve_base(str(tiny("o4_5")), duplex_prompt="o45_fc")
    with pytest.raises(CheckpointError, match="<unk> must have id 128244"):
        load_tokenizer(tiny("o4_5"), duplex_prompt="o45_fc")
    with pytest.raises(UserError, match="--duplex_prompt o5: known are native and o45_fc: its network"):
        resolve_base(str(tiny("o4_5")), duplex_prompt="o5")
    with pytest.raises(UserError, match="MiniCPM-V 2.6 has no full-duplex prompt"):
        resolve_base(str(tiny("v2_6")), duplex_prompt="o45_fc")


def test_audio_of_another_length_than_the_record_says(encoder: Encoder, samples: list[Sample]) -> None:
    (media,) = samples[0].media("audio")
    assert isinstance(media.data, Track)
    wrong = Media("audio", replace(media.data, samples=(24_001,)))
    messages = (samples[0].messages[0], Message("user", (wrong,)), samples[0].messages[2])
    with pytest.raises(DataError, match="has 24000 samples at 16 kHz, and the record says 24001"):
        encoder.encode(replace(samples[0], messages=messages))


@pytest.fixture(scope="module")
def batch(encoder: Encoder, examples: list[Example]) -> dict[str, torch.Tensor]:
    return pad(examples, encoder.pad_id)


def _step(model: Any, batch: dict[str, torch.Tensor]) -> None:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model(**batch).loss.backward()
    torch.optim.SGD(trained, 0.1).step()
    model.zero_grad()


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the last positions, which depend on all of the batch."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs, logits_to_keep=16).logits


@pytest.fixture(scope="module")
def adapter(
    base: BaseCheckpoint, batch: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor]:
    """A trained adapter, and the logits of the model that was trained."""
    model: Any = load_model(base.folder)
    add_duplex_rows(model)
    for end in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert end.shape[0] == LAST_ID
        torch.testing.assert_close(end[FIRST_ID:], end[:FIRST_ID].mean(0).expand(len(NEW_TOKENS), -1))
    model.requires_grad_(False)
    adapted = add_lora(model, base.family, [], LoraArguments(lora_r=4))
    assert (
        next(
            row.mode
            for row in part_rows(adapted, base.family.parts, dict.fromkeys(base.family.parts, 1.0))
            if row.part == "llm"
        )
        == "LoRA r=4 + 24 rows"
    )
    for _ in range(2):
        _step(adapted, batch)
    out = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(str(out))
    finish_adapter(adapted, out, base)
    return out, _logits(adapted, batch)


def test_an_adapter_has_the_new_rows_alone(adapter: tuple[Path, torch.Tensor]) -> None:
    out, _ = adapter
    with safe_open(str(out / "adapter_model.safetensors"), framework="pt") as file:
        rows = {name: file.get_slice(name).get_shape() for name in file.keys() if "lora_" not in name}  # noqa: SIM118
        changed = [file.get_tensor(name) for name in rows]
    assert list(rows.values()) == [[24, 128]] * 2
    assert all((tensor != tensor[0]).any() for tensor in changed)  # they started as one
    tokenizer = load_tokenizer(out)
    assert tokenizer.convert_tokens_to_ids(list(NEW_TOKENS)) == list(range(FIRST_ID, LAST_ID))
    assert prompt_of(out) == "o45_fc"


@pytest.mark.parametrize("loader", [AutoPeftModel.from_pretrained, load_model], ids=["peft", "load_model"])
def test_an_adapter_loads(
    loader: Callable[..., Any], adapter: tuple[Path, torch.Tensor], batch: dict[str, torch.Tensor]
) -> None:
    out, logits = adapter
    torch.testing.assert_close(_logits(loader(str(out)), batch), logits)


def test_training_goes_on_from_an_adapter(
    adapter: tuple[Path, torch.Tensor], base: BaseCheckpoint, batch: dict[str, torch.Tensor]
) -> None:
    out, logits = adapter
    again = resolve_base(str(base.folder), trained=out)
    assert (again.duplex_name, again.adds_duplex_rows) == ("o45_fc", True)
    model: Any = load_model(base.folder)
    lora = LoraArguments(lora_r=4, lora_weight_path=str(out))
    with pytest.raises(UserError, match="--lora_weight_path .* was trained with the rows"):
        add_lora(model, base.family, [], lora)
    add_duplex_rows(model)
    adapted = add_lora(model, base.family, [], lora)
    torch.testing.assert_close(_logits(adapted, batch), logits)
    _step(adapted.train(), batch)
    assert not torch.equal(_logits(adapted, batch), logits)


def test_a_merged_model_has_the_rows(
    adapter: tuple[Path, torch.Tensor], batch: dict[str, torch.Tensor], tmp_path: Path, capsys: Any
) -> None:
    out, logits = adapter
    merged = tmp_path / "merged"
    assert export(["--adapter_name_or_path", str(out), "--export_dir", str(merged)]) == 0
    assert "merged=" in capsys.readouterr().out
    config = json.loads((merged / "config.json").read_text())
    assert (config["vocab_size"], config["duplex_prompt"], config["duplex_sdk"]) == (LAST_ID, "o45_fc", "0.0.6")
    again = resolve_base(str(merged))
    assert again.duplex is not None
    assert not again.adds_duplex_rows
    torch.testing.assert_close(_logits(load_model(merged), batch), logits, rtol=1e-4, atol=1e-4)
    assert len(load_tokenizer(merged)) == LAST_ID


def test_a_full_result_has_the_rows(base: BaseCheckpoint, batch: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model: Any = load_model(base.folder)
    add_duplex_rows(model)
    _step(model, batch)
    model.save_pretrained(tmp_path)
    finish_full(tmp_path, base)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(_logits(loaded, batch), _logits(model, batch))
    assert resolve_base(str(tmp_path)).duplex_name == "o45_fc"
    with pytest.raises(UserError, match="was trained in the prompt o45_fc; omit the flag"):
        resolve_base(str(tmp_path), duplex_prompt="native")


def test_results_of_another_version_of_the_package_are_refused(
    adapter: tuple[Path, torch.Tensor], base: BaseCheckpoint, tmp_path: Path
) -> None:
    settings = json.loads((adapter[0] / "adapter_config.json").read_text())
    assert settings["auto_mapping"]["duplex_sdk"] == "0.0.6"
    settings["auto_mapping"]["duplex_sdk"] = "0.0.5"
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"as minicpm-o5-sdk 0.0.5 writes them, .* reads them by 0.0.6"):
        resolve_base(str(base.folder), trained=tmp_path)
