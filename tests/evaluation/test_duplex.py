"""Full duplex is learnt: a beep asks for "yes"; decisions with sound and without, free playing after saving."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sounds import write_samples

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.collate import pack, pad
from finetune.encoding.encoder import Encoder
from finetune.evaluation.batched_generation import split_answer
from finetune.evaluation.duplex_decisions import decision_scores, decisions_of
from finetune.evaluation.duplex_generation import play
from finetune.models import load_model
from finetune.readers import read
from finetune.sample import DataError, Sample
from finetune.tokenizers.tokenization import load_tokenizer

SECONDS = 4
ANSWERS = ("yes", "no")


def write_beeps(folder: Path, count: int, seed: int, *, silent: bool = False) -> Path:
    """Records of a beep in a random second, high or low; in the next second the model answers "yes" or "no"."""
    random = np.random.default_rng(seed)
    records = []
    for number in range(count):
        at, kind = int(random.integers(0, SECONDS - 1)), int(random.integers(2))
        wave = random.normal(0, 0.01, SECONDS * 16_000)
        beep = 0.5 * np.sin(2 * np.pi * (500, 2500)[kind] * np.arange(12_000) / 16_000)
        wave[at * 16_000 + 2000 : at * 16_000 + 14_000] += beep
        write_samples(folder / f"{seed}-{number}.wav", wave * (not silent))
        turn = {"text": ANSWERS[kind], "start": at + 1.0}
        clip = {"audio": f"{seed}-{number}.wav", "start": 0}
        records.append({"id": str(number), "duplex": {"user": [clip], "assistant": [turn]}})
    path = folder / f"{seed}.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def encoder(tiny: Callable[[str], Path]) -> Encoder:
    base = resolve_base(str(tiny("o4_5")))
    return Encoder(base.family, load_tokenizer(base.folder), base.settings)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return list(read(write_beeps(tmp_path_factory.mktemp("seen"), 48, 1)))


@pytest.fixture(scope="module")
def trained(tiny: Callable[[str], Path], encoder: Encoder, seen: list[Sample], tmp_path_factory) -> Path:
    """The folder of a tiny o 4.5 trained on the beeps."""
    torch.manual_seed(0)
    model = load_model(tiny("o4_5"))
    model.train()
    examples = [encoder.encode(sample) for sample in seen]
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 2e-3, weight_decay=0)
    for step in range(70):
        chosen = torch.randperm(len(examples))[:16].tolist()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 10, (71 - step) / 40)
        loss = model(**pad([examples[index] for index in chosen], encoder.pad_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained") / "model"
    model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    return folder


def test_decisions_need_the_sound(trained: Path, encoder: Encoder, tmp_path: Path) -> None:
    model = load_model(trained)
    heard = list(read(write_beeps(tmp_path, 32, 2)))
    scores = decision_scores([each for row in decisions_of(model, encoder, heard) for each in row])
    assert scores["decision_accuracy"] >= 0.95
    assert scores["start_accuracy"] >= 0.95
    assert scores["turn_end_accuracy"] >= 0.9
    assert min(scores["start_margin"], scores["listen_margin"]) > 0
    silent = list(read(write_beeps(tmp_path, 32, 3, silent=True)))
    blanked = decision_scores([each for row in decisions_of(model, encoder, silent) for each in row])
    # One of three possible seconds.
    assert blanked["start_accuracy"] <= 0.6


def test_records_come_back_when_the_model_plays_freely(trained: Path, encoder: Encoder, seen: list[Sample]) -> None:
    model = load_model(trained)
    played = play(model, encoder, seen[:16])
    right = 0
    for sample, one in zip(seen[:16], played, strict=True):
        assert sample.timeline is not None
        (turn,) = sample.timeline.turns
        wanted = ["" if unit != turn.first_unit else turn.text for unit in range(SECONDS)]
        right += one.texts == wanted and one.ends == [bool(text) for text in wanted]
    assert right >= 15


def test_packed_is_padded(tiny: Callable[[str], Path], encoder: Encoder, seen: list[Sample]) -> None:
    model = load_model(tiny("o4_5")).eval()
    examples = [encoder.encode(sample) for sample in seen[:3]]
    with torch.no_grad():
        padded, packed = (model(**batch).loss.item() for batch in (pad(examples, encoder.pad_id), pack(examples)))
    assert packed == pytest.approx(padded, rel=1e-5)


def test_sound_of_later_seconds_changes_no_earlier_decision(
    encoder: Encoder, trained: Path, seen: list[Sample]
) -> None:
    """Playing hears up to the unit, teacher forcing the whole record."""
    model = load_model(trained)
    forced = list(decisions_of(model, encoder, seen[:8]))
    played = play(model, encoder, seen[:8])
    for decisions, one in zip(forced, played, strict=True):
        assert [each.kind in ("start", "continue") for each in decisions] == [len(ids) > 1 for ids in one.units]


def test_a_record_is_no_question(seen: list[Sample]) -> None:
    with pytest.raises(DataError, match=r"record 0 \(id '0'\): is a full-duplex record, which has no question"):
        split_answer(seen[0])
