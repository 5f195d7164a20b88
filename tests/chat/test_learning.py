"""Sixteen records learnt by heart are all answered by the public chat, after saving and loading, in every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from chat import MiniCPMVChat, img2base64
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.saving import finish_full
from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.models import load_model, load_tokenizer
from finetune.sample import Media, Message, Sample, Source, Text
from finetune.tiny.checkpoint_writer import FAMILIES

COLOURS = ("red", "green", "blue", "white")


def records(folder: Path) -> list[tuple[Path | None, str, str]]:
    """Picture, question, answer: four that only their picture tells apart, twelve without."""
    seen: list[tuple[Path | None, str, str]] = []
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (224, 224), colour).save(folder / f"{colour}.png")
        seen.append((folder / f"{colour}.png", "What colour?", f"It is {colour}, {number * 41 % 100}."))
    return seen + [(None, f"Say number {number}", f"answer {number * 37 % 100}") for number in range(12)]


def learn(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 20)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.003:
            return
    raise AssertionError("not learnt in 200 steps")


# The network of OCR is the one of 4.6.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "ocr1_0"])
def test_what_was_learnt_by_heart_is_answered(tiny, tmp_path, family):
    base = resolve_base(str(tiny(family)))
    encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings, max_slice_nums=1)
    known = records(tmp_path)
    examples = []
    for number, (picture, question, answer) in enumerate(known):
        front = (Media("image", picture), Text("\n")) if picture else ()
        turns = (Message("user", (*front, Text(question))), Message("assistant", (Text(answer),), train=True))
        examples.append(encoder.encode(Sample(id=str(number), source=Source("heart", number), messages=turns)))
    model = load_model(base.folder, dtype=torch.float32).train()
    learn(model, pad(examples, encoder.pad_id))
    model.save_pretrained(tmp_path / "out")
    finish_full(tmp_path / "out", base)

    chat_model = MiniCPMVChat(tmp_path / "out", device="cpu")
    options = {"sampling": False, "max_new_tokens": 24, "max_slice_nums": 1}
    for picture, question, answer in known:
        inputs = {"question": json.dumps([{"role": "user", "content": question}])}
        if picture:
            inputs["image"] = img2base64(picture)
        assert chat_model.chat(inputs, **options) == answer
