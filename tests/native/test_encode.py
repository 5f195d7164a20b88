"""Ids, masks and pixels are those of the published processor."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conversations import CONVERSATIONS, as_published, encoder, sample
from transformers import AutoProcessor, MiniCPMV4_6ImageProcessor

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.chat_template_check import check_chat_template
from finetune.encoding.collate import pad
from finetune.encoding.encoder import AlignmentError, Encoder
from finetune.encoding.length_policy import LengthPolicy
from finetune.media import transformers_processor as processor_module
from finetune.media.slicing import SliceSpec, plan
from finetune.models import load_tokenizer
from finetune.sample import Message


def published(folder: Path, messages: Sequence[Message], *, generate: bool, slices: int = 9) -> dict:
    images = {"max_slice_nums": slices}
    return AutoProcessor.from_pretrained(folder).apply_chat_template(
        as_published(messages),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=generate,
        processor_kwargs={"images_kwargs": images},
    )


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("generate", [True, False])
def test_batch_is_the_published_one(native, family: str, mode: str, name: str, generate: bool) -> None:
    folder, messages = native(family, mode), CONVERSATIONS[name]
    given = pad([encoder(folder).encode(sample(messages), generate=generate)], 0)
    wanted = dict(published(folder, messages[:-1] if generate else messages, generate=generate))
    labels = given.pop("labels")
    assert given.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(given[key], tensor.to(given[key].dtype)), key
    assert (labels >= 0).any() != generate


def test_labels_are_the_trained_answers(native, family: str) -> None:
    made = encoder(native(family))
    tokenizer = made.tokenizer

    def labelled(name: str) -> str:
        labels = made.encode(sample(CONVERSATIONS[name])).labels
        return str(tokenizer.decode(labels[labels >= 0]))

    assert labelled("sliced") == "Done.<|im_end|>"
    assert labelled("turns") == "One.<|im_end|>Three.<|im_end|>"
    assert labelled("thinking") == "Because.<|im_end|><think>\nI look again.\n</think>\n\nYes.<|im_end|>"


def test_training_is_prompt_answer_and_end(native, family: str) -> None:
    made = encoder(native(family))
    messages = CONVERSATIONS["several"]
    prompt = made.encode(sample(messages), generate=True).input_ids.tolist()
    whole = made.encode(sample(messages)).input_ids.tolist()
    end = [made.prompt_tokenizer.control("<|im_end|>"), *made.prompt_tokenizer.fixed("\n")]
    assert whole == [*prompt, *made.prompt_tokenizer.text("They differ."), *end]


@pytest.mark.parametrize("slices", [1, 2, 4, 6, 9])
def test_fewer_slices(native, family: str, slices: int) -> None:
    folder, messages = native(family), CONVERSATIONS["several"]
    given = encoder(folder, max_slice_nums=slices).encode(sample(messages), generate=True)
    wanted = published(folder, messages[:-1], generate=True, slices=slices)
    batch = pad([given], 0)
    assert torch.equal(batch["input_ids"], wanted["input_ids"])
    assert torch.equal(batch["pixel_values"], wanted["pixel_values"])


def test_a_long_sample_is_cut_into_fewer_slices(native, family: str) -> None:
    made = encoder(native(family))
    whole = made.measure(sample(CONVERSATIONS["several"]))
    made.max_length = whole.tokens - 20
    example, outcome = LengthPolicy(made, "shrink").encode(sample(CONVERSATIONS["several"]))
    assert outcome == "shrunk"
    assert len(example.input_ids) <= made.max_length
    assert len(example.tgt_sizes) < whole.items
    assert example.tgt_sizes.prod(1).sum() == len(example.patches)


def test_measure_is_what_encode_gives(native, family: str) -> None:
    made = encoder(native(family))
    for messages in CONVERSATIONS.values():
        measure, example = made.measure(sample(messages)), made.encode(sample(messages))
        assert (measure.tokens, measure.items) == (len(example.input_ids), len(example.tgt_sizes))
        assert measure.patches == len(example.patches)


def test_several_rows(native, family: str) -> None:
    made = encoder(native(family))
    examples = [made.encode(sample(CONVERSATIONS[name]), generate=True) for name in ("several", "text", "sliced")]
    right, left = pad(examples, 5), pad(examples, 5, side="left")
    assert torch.equal(right["pixel_values"], left["pixel_values"])
    assert right["pixel_values"].shape == (1, 3, 14, sum(len(example.patches) for example in examples) * 14)
    assert right["target_sizes"].shape == (sum(len(example.tgt_sizes) for example in examples), 2)
    for batch in (right, left):
        assert next(iter(batch)) == "input_ids"
        assert "position_ids" not in batch
        if "mm_token_type_ids" in batch:
            pad_id = made.prompt_tokenizer.control(made.layout.placeholder)
            assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"].eq(pad_id))
    batch = pad([made.empty("nothing"), examples[1]], 5)
    assert "pixel_values" not in batch
    assert (pad([made.empty("nothing"), examples[0]], 5)["target_sizes"] == examples[0].tgt_sizes).all()


def test_the_chat_template_agrees(native, family: str) -> None:
    base = resolve_base(str(native(family)))
    assert check_chat_template(base.family, load_tokenizer(base.folder))


@pytest.mark.parametrize("change", ["as it is", "no trimming", "default system"])
@pytest.mark.parametrize("name", ["sliced", "turns", "system", "thinking"])
def test_the_prompt_follows_the_template_of_the_checkpoint(native, family: str, change: str, name: str) -> None:
    base = resolve_base(str(native(family)))
    tokenizer = load_tokenizer(base.folder)
    template = str(tokenizer.chat_template)
    if change == "no trimming":
        template = template.replace("shown(message.content) | trim", "shown(message.content)")
    elif change == "default system":
        head = "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' -}}{%- endif -%}"
        template = head + template
    tokenizer.chat_template = template
    made = Encoder(base.family, tokenizer, base.settings)
    messages = CONVERSATIONS[name][:-1]
    prompt = made.encode(sample(messages), generate=True)
    wanted = str(tokenizer.apply_chat_template(as_published(messages), tokenize=False, add_generation_prompt=True))
    text = str(tokenizer.decode(prompt.input_ids))
    written = re.sub(r"<image_id>.*?</image_id>", "", text)
    written = re.sub(r"<image>(<.image_pad.>)+</image>(\n?<slice>(<.image_pad.>)+</slice>)*", "<|image_pad|>", written)
    assert written == wanted


def test_slicing_rule() -> None:
    """Our integers are the processor's, for ten thousand sizes."""
    theirs, draw = MiniCPMV4_6ImageProcessor(), random.Random(0)
    for _ in range(10_000):
        width, height = draw.randint(1, 4000), draw.randint(1, 4000)
        most, side = draw.choice([1, 2, 9, 36]), draw.choice([112, 448])
        mode, merge = draw.choice([("16x", 4), ("4x", 2)])
        ours = plan(width, height, SliceSpec(most, side, 14, merge))
        grid = theirs.get_sliced_grid((height, width), most, side)
        best = theirs.find_best_resize((height, width), side, 14, mode, allow_upscale=grid is None)
        assert ours.thumbnail == best[::-1]
        assert ours.grid == (None if grid is None else (grid[1], grid[0]))
        if grid is not None:
            refined = theirs.get_refine_size((height, width), grid, side, 14, mode, allow_upscale=True)
            assert ours.refined == refined[::-1]


@pytest.mark.parametrize(
    ("size", "most", "mode", "tokens"),
    [
        ((448, 448), 9, "16x", 64),
        ((640, 480), 9, "16x", 203),
        ((1024, 768), 9, "16x", 315),
        ((1344, 1344), 9, "16x", 640),
        ((1920, 1080), 9, "16x", 578),
        ((1920, 1080), 36, "16x", 822),
        ((4000, 3000), 36, "16x", 2303),
        ((1920, 1080), 1, "16x", 66),
        ((448, 448), 9, "4x", 256),
        ((640, 480), 9, "4x", 772),
        ((1920, 1080), 9, "4x", 2292),
        ((1920, 1080), 1, "4x", 252),
    ],
)
def test_published_counts(size: tuple[int, int], most: int, mode: str, tokens: int) -> None:
    """Placeholders of an image as the processor of transformers 5.23 counts them, at the published resolution."""
    merge = {"16x": 4, "4x": 2}[mode]
    cuts = plan(*size, SliceSpec(most, 448, 14, merge))
    sides = [cuts.thumbnail] + [cuts.slice or (0, 0)] * (cuts.items - 1)
    assert sum(width * height // (14 * merge) ** 2 for width, height in sides) == tokens


def test_a_processor_that_cuts_otherwise_is_seen(native, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = processor_module.patch_rows

    def turned(*given: object, **more: object) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        rows, grids = whole(*given, **more)  # type: ignore[arg-type]
        return rows, [(columns, lines) for lines, columns in grids]

    monkeypatch.setattr(processor_module, "patch_rows", turned)
    with pytest.raises(AlignmentError, match="items of"):
        encoder(native("v4_6")).encode(sample(CONVERSATIONS["sliced"]))


def test_settings_of_the_processor_count(native) -> None:
    assert encoder(native("v4_6")).slicing == SliceSpec(9, 112, 14, 4)
    assert encoder(native("v4_6", "4x")).slicing.merge == 2
    assert encoder(native("v4_6", "4x")).layout.pixels_per_token == 28 * 28
