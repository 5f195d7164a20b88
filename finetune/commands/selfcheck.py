"""``python -m finetune selfcheck MODEL``: smoke test of a checkpoint: loading, prompt, caption and loss.

Loads it strictly, compares its prompt with its own chat template, captions a built-in image and compares the loss of
the correct caption with that of its shuffled words. With random weights only that every step runs has meaning.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.commands.parser import CommandParser
from finetune.commands.shared_flags import add_prompt_flags
from finetune.sample import Media, Message, Sample, Source, Text

if TYPE_CHECKING:
    import argparse

    import torch
    from PIL import Image

    from finetune.checkpoints.base_checkpoint import BaseCheckpoint
    from finetune.encoding.encoder import Encoder

QUESTION = "What is in the picture?"
CAPTION = "The picture shows a red circle on a white background, with the word STOP written below it."
_SIDE = 448
_SHOWN_IDS = 24


def main(argv: list[str]) -> int:
    """Runs every check; returns 0 when all ran, raises UserError for an invalid checkpoint."""
    args = build_parser().parse_args(argv)

    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.encoding.chat_template_check import check_chat_template
    from finetune.encoding.encoder import Encoder
    from finetune.evaluation.batched_generation import generate_answers
    from finetune.models import load_tokenizer

    trained = args.adapter and Path(args.adapter)
    base = resolve_base(args.model, args.downsample_mode, use_image_id=args.use_image_id, trained=trained)
    model = _loaded(args, base)
    tokenizer = load_tokenizer(base.folder)
    encoder = Encoder(base.family, tokenizer, base.settings)
    ids = encoder.encode(_sample(None), generate=True).input_ids.tolist()
    print(f"prompt     {tokenizer.decode(ids)!r}\n           {_short(ids)}")
    agrees = check_chat_template(base.family, tokenizer, encoder.layout, encoder.prompt_tokenizer)
    print(f"template   {'the same prompt by its own chat template' if agrees else 'none in the checkpoint'}")

    image = draw()
    prompt = _sample(image)
    print(f"image      a red circle on white, STOP below it; {encoder.measure(prompt).items} visual items")
    answers = generate_answers(model, tokenizer, encoder, [prompt], max_new_tokens=args.max_new_tokens)
    print(f"caption    {answers[0]!r}")
    _compare_captions(model, encoder, image, math.log(base.vocab_size))
    return 0


def _loaded(args: argparse.Namespace, base: BaseCheckpoint) -> torch.nn.Module:
    """The model, described on the terminal."""
    import torch

    from finetune.models import load_model
    from finetune.training.freezing import numel

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    options: dict[str, Any] = {"dtype": args.dtype, "device_map": {"": device}}
    options["downsample_mode"] = base.downsample_mode
    if args.adapter is None:
        model = load_model(base.folder, **options)
    else:
        model = load_model(args.adapter, base=base.folder, **options)
    count, dtype = sum(numel(parameter) for parameter in model.parameters()), model.dtype
    print(f"loaded     {base.family.title}, {count / 1e6:,.1f} M parameters, all of them from the files")
    if args.adapter is not None:
        print(f"adapter    {args.adapter}")
    for line in base.choices:
        print(f"mode       {line}")
    print(f"runs on    {device}, {str(dtype).removeprefix('torch.')}")
    return model.eval()


def _compare_captions(model: torch.nn.Module, encoder: Encoder, image: Image.Image, chance: float) -> None:
    right, shuffled = (caption_loss(model, encoder, image, text) for text in (CAPTION, _shuffle(CAPTION)))
    print(f"loss       {right:.3f} correct caption, {shuffled:.3f} words shuffled, {chance:.2f} chance (ln vocabulary)")
    if right < shuffled and right < chance / 2:
        print("verdict    it prefers the correct caption, as a trained checkpoint does")
    else:
        print("verdict    it does NOT behave like a trained checkpoint; expected only with random weights")


def draw() -> Image.Image:
    """The built-in image: a red circle on white above the word STOP."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (_SIDE, _SIDE), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((114, 40, 334, 260), fill=(220, 20, 30))
    pen.text((_SIDE // 2, 350), "STOP", fill="black", font=ImageFont.load_default(96), anchor="mm")
    return image


def caption_loss(model: torch.nn.Module, encoder: Encoder, image: Image.Image, caption: str) -> float:
    """Mean loss over the tokens of a caption of the image."""
    import torch

    from finetune.encoding.collate import pad

    device = next(model.parameters()).device
    batch = pad([encoder.encode(_sample(image, caption))], encoder.pad_id)
    with torch.no_grad():
        return model(**{key: value.to(device) for key, value in batch.items()}).loss.item()


def _sample(image: Image.Image | None, answer: str | None = None) -> Sample:
    media = () if image is None else (Media("image", image), Text("\n"))
    messages = (Message("user", (*media, Text(QUESTION))),)
    if answer is not None:
        messages += (Message("assistant", (Text(answer),), train=True),)
    return Sample(id="selfcheck", source=Source("selfcheck", 0), messages=messages)


def _shuffle(text: str) -> str:
    words = text.split()
    random.Random(0).shuffle(words)
    return " ".join(words)


def _short(ids: list[int]) -> str:
    return f"{len(ids)} ids: {' '.join(map(str, ids[:_SHOWN_IDS]))}{' ...' if len(ids) > _SHOWN_IDS else ''}"


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(prog="python -m finetune selfcheck", description=__doc__)
    parser.add_argument("model", help="folder of a checkpoint, or a hub id")
    parser.add_argument("--adapter", help="folder of an adapter trained on it")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    parser.add_argument("--dtype", default="auto", help="auto (the file's), bfloat16, float16, float32")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="longest caption")
    add_prompt_flags(parser)
    return parser
