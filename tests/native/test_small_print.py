"""Images that are enlarged by the print in them: sizes, ids and pixels of the image processor of MiniCPM-OCR."""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversations import answer, as_published, encoder, sample
from PIL import Image
from transformers import AutoProcessor, MiniCPMOcrImageProcessor

from finetune.encoding.collate import pad
from finetune.encoding.length_policy import LengthPolicy
from finetune.media.slicing import SliceSpec, item_sizes, plan
from finetune.media.small_print import SmallPrint
from finetune.sample import Media, Message, Text
from finetune.utils.errors import UserError

MODES = {"16x": 4, "4x": 2}


def page(size: tuple[int, int], glyph: int, *, dark: bool = False) -> Image.Image:
    """A page of letters so many pixels high; with 0 an empty one."""
    width, height = size
    letter = np.full((glyph + 3, glyph + 2), 255, np.uint8)
    letter[2 : 2 + glyph, 1 : 1 + glyph * 2 // 3] = 40
    pixels = np.tile(letter, (height // letter.shape[0] + 1, width // letter.shape[1] + 1))[:height, :width]
    return Image.fromarray(255 - pixels if dark else pixels).convert("RGB")


def mixed(size: tuple[int, int]) -> Image.Image:
    """Small print on the left, large letters on the right: the slices of one image come to differ."""
    left = page((size[0] // 2, size[1]), 7)
    right = page((size[0] - size[0] // 2, size[1]), 40)
    together = Image.new("RGB", size)
    together.paste(left)
    together.paste(right, (size[0] // 2, 0))
    return together


def sizes_of(picture: Image.Image, spec: SliceSpec) -> list[tuple[int, int]]:
    look = SmallPrint(picture, spec.scale_resolution) if spec.enlarge == "adaptive" else None
    return [(height // 14, width // 14) for width, height in item_sizes(plan(*picture.size, spec, look))]


def published(picture: Image.Image, spec: SliceSpec) -> list[tuple[int, int]]:
    mode = {merge: mode for mode, merge in MODES.items()}[spec.merge]
    options: dict[str, Any] = {"max_slice_nums": spec.max_slice_nums, "scale_resolution": spec.scale_resolution}
    options |= {"small_image_upsize": spec.enlarge, "downsample_mode": mode}
    made = MiniCPMOcrImageProcessor()(images=[picture], return_tensors="pt", **options)
    return [(rows, columns) for rows, columns in made["target_sizes"].tolist()]


@pytest.mark.parametrize("enlarge", ["always", "never", "adaptive"])
def test_sizes_are_those_of_the_processor(enlarge) -> None:
    """For pages of every size and print, light and dark."""
    draw, spared = random.Random(0), 0
    for number in range(60):
        side = draw.choice([56, 112, 224])
        width, height = (draw.randint(2, side * 2) for _ in range(2))
        glyph = draw.choice([0, 5, 8, 11, 14, 30])
        picture = mixed((width, height)) if number % 4 == 0 else page((width, height), glyph, dark=number % 3 == 0)
        spec = SliceSpec(draw.choice([1, 4, 9]), side, 14, draw.choice([2, 4]), enlarge)
        given = sizes_of(picture, spec)
        assert given == published(picture, spec), (picture.size, spec, glyph)
        always = item_sizes(plan(*picture.size, replace(spec, enlarge="always")))
        spared += given != [(high // 14, wide // 14) for wide, high in always]
    assert (spared > 5) == (enlarge != "always")


# Of slices with 112 pixels: print that is enlarged, letters that are not, both in one image, a tiny image, a large one.
PICTURES = {
    "print": page((90, 70), 8),
    "letters": page((90, 70), 30),
    "mixed": mixed((250, 100)),
    "tiny": page((50, 30), 0),
    "large": mixed((300, 290)),
}


def question(*pictures: str) -> tuple[Message, ...]:
    parts = [Media("image", PICTURES[name]) for name in pictures]
    return Message("user", (*parts, Text("What is written there?"))), answer("Much.")


@pytest.fixture(scope="module")
def folders(native, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by how they enlarge."""
    made = {}
    for enlarge in ("never", "adaptive"):
        folder = made[enlarge] = tmp_path_factory.mktemp("print") / enlarge
        shutil.copytree(native("ocr1_0", "4x"), folder)
        told(folder, enlarge)
    return made


def told(folder: Path, enlarge: str) -> None:
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["small_image_upsize"] = enlarge
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("enlarge", ["never", "adaptive"])
@pytest.mark.parametrize("pictures", [*((name,) for name in PICTURES), tuple(PICTURES)], ids="+".join)
def test_a_batch_is_the_published_one(folders, enlarge: str, pictures: tuple[str, ...]) -> None:
    """By the settings of the folder alone."""
    messages = question(*pictures)
    processor = AutoProcessor.from_pretrained(folders[enlarge])
    wanted = processor.apply_chat_template(as_published(messages), tokenize=True, return_dict=True, return_tensors="pt")
    made = encoder(folders[enlarge])
    example = made.encode(sample(messages))
    given = pad([example], 0)
    assert torch.equal(given["input_ids"], wanted["input_ids"])
    assert torch.equal(given["target_sizes"], wanted["target_sizes"])
    assert torch.equal(given["pixel_values"], wanted["pixel_values"])
    measure = made.measure(sample(messages))
    assert (measure.tokens, measure.items, measure.patches) == (
        len(example.input_ids),
        len(example.tgt_sizes),
        len(example.patches),
    )


def test_slices_of_one_image_differ(folders) -> None:
    sizes = encoder(folders["adaptive"]).encode(sample(question("mixed"))).tgt_sizes.tolist()
    assert len({tuple(size) for size in sizes[1:]}) > 1


def test_a_long_sample_is_cut_into_fewer_slices(folders) -> None:
    made = encoder(folders["adaptive"])
    whole = made.measure(sample(question(*PICTURES)))
    made.max_length = whole.tokens - 40
    example, outcome = LengthPolicy(made, "shrink").encode(sample(question(*PICTURES)))
    assert outcome == "shrunk"
    assert len(example.input_ids) <= made.max_length
    assert example.tgt_sizes.prod(1).sum() == len(example.patches)


def test_shrunk_images_are_looked_at_as_they_are_cut(folders) -> None:
    """Letters alone stay small; made smaller still, the image is a tiny one, which is enlarged."""
    for shrunk, wanted in ((None, [[4, 6]]), (2000, [[6, 6]])):
        made = encoder(folders["adaptive"], max_pixels=shrunk)
        assert made.encode(sample(question("letters"))).tgt_sizes.tolist() == wanted


def test_without_opencv_one_line_says_so(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"small_image_upsize 'adaptive'.* needs OpenCV: pip install -e '\.\[ocr\]'$"):
        encoder(folders["adaptive"])
    encoder(folders["never"])


def test_an_unknown_way_is_refused(folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["never"], tmp_path / "folder")
    told(folder, "sometimes")
    with pytest.raises(UserError, match="small_image_upsize 'sometimes'; known are always, never, adaptive"):
        encoder(folder)
