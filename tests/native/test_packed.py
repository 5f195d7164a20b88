"""Packed rows of 4.6, 4.7 and OCR, with the kernels of linear attention: every segment is as it is alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clips import write_clip
from conversations import CONVERSATIONS, LARGE, WHOLE, answer, encoder, sample, user
from linear_kernels import put_in_place

from finetune.encoding.collate import pack, pad
from finetune.models import load_model
from finetune.models.packed_attention import SEGMENTED
from finetune.sample import Media, Message, Text

SEGMENTS = ("sliced", "text", "turns", "several", "clip")
CLEAN, POISONED = [0, 2, 4], [1, 3]
OTHERS = {1: (user(WHOLE, "Something else?"), answer("Yes, all of it.")), 3: (user(LARGE, "Read."), answer("No."))}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


def examples(folder: Path, clip: Path, *, poison: bool = False) -> list[Any]:
    made = encoder(folder)
    moving = (Message("user", (Media("video", clip), Text("What happens?"))), answer("Nothing."))
    given = [moving if name == "clip" else CONVERSATIONS[name] for name in SEGMENTS]
    if poison:
        given = [OTHERS.get(index, messages) for index, messages in enumerate(given)]
    return [made.encode(sample(messages)) for messages in given]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def row_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).row_loss


def test_segments_of_the_mode_of_ocr(native, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers are those of 4.6, which the next test looks at closely."""
    folder = native("ocr1_0", "4x")
    model, alone = load_model(folder).eval(), [pad([each], 0) for each in examples(folder, clip)]
    rows = torch.cat([row_loss(model, row) for row in alone])
    put_in_place(monkeypatch)
    assert torch.allclose(row_loss(model, pack(examples(folder, clip))), rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["v4_6", "v4_7"])
def test_segments_are_sealed(native, clip: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients of rows by transformers' own code are those of segments by kernels that are told them."""
    folder = native(family)
    model, alone = load_model(folder).eval(), [pad([each], 0) for each in examples(folder, clip)]
    tokens = int(sum((row["labels"] != -100).sum() for row in alone))
    outputs = [model(**row, num_items_in_batch=tokens) for row in alone]
    torch.stack([output.loss for output in outputs]).sum().backward()
    rows, wanted = torch.cat([output.row_loss for output in outputs]).detach(), gradients(model)
    batch, other = pack(examples(folder, clip)), pack(examples(folder, clip, poison=True))
    put_in_place(monkeypatch)
    for implementation in ("sdpa", "eager", SEGMENTED):  # the last as it was loaded
        model.model.language_model.set_attn_implementation(implementation)
        assert torch.allclose(row_loss(model, batch), rows, rtol=1e-5, atol=1e-5), implementation
        poisoned = row_loss(model, other)
        assert torch.allclose(poisoned[CLEAN], rows[CLEAN], rtol=1e-5, atol=1e-5), implementation
        assert (poisoned[POISONED, 0] - rows[POISONED, 0]).abs().min() > 1e-2
    for checkpointed in (False, True):
        if checkpointed:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch).loss.backward()
        found = gradients(model)
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            assert torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-5), name


def test_without_the_kernels_no_segment_leaks_in_silence(native, clip: Path, family: str) -> None:
    folder = native(family)
    batch = pack(examples(folder, clip))
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        row_loss(load_model(folder).eval(), batch)


def test_a_row_that_could_leak_is_refused(native, clip: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    folder = native(family)
    batch, model = pack(examples(folder, clip)), load_model(folder).eval()
    with pytest.raises(ValueError, match="an attention_mask"):
        model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    del batch["position_ids"]
    with pytest.raises(ValueError, match="no position_ids"):
        model(**batch)
