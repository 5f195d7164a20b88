"""Writes the demo dataset: synthetic images, questions about their colours, known answers.

Four kinds of record, named in the extra key ``task``: ``single`` (a square on noise), ``sliced`` (fine dots that the
thumbnail averages away, so that only the slices show their colour), ``multi_image`` (one question about two images,
answered in their order) and ``multi_turn`` (two turns with an image each).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.tiny.checkpoint_writer import start_folder
from finetune.tiny.demo_phrases import COLOURS, DOTS_QUESTION, SQUARE_QUESTION, SQUARES_ANSWER, SQUARES_QUESTION

TRAIN = 2048
EVAL = 128
GREY = 127
# (width, height) in pixels; none has more than 112 x 112 pixels, so the tiny checkpoints do not cut them.
PLAIN_SIZES = ((112, 112), (126, 98), (98, 126))
# Cut into 2 x 2 slices of 112 x 112 at full resolution; the thumbnail has half the resolution.
DOTS_SIZE = (224, 224)
_NOISE_CELL = 7
_NOISE = 40
# A dot is one pixel of four, three times as strong as its opposite around it: the mean of every 2 x 2 cell is GREY.
_OPPOSITE = 42

# The images of a record and its turns: (question, answer).
Drawn = tuple[list[Image.Image], list[tuple[str, str]]]


def write_demo_dataset(
    out: Path | str, train: int = TRAIN, eval: int = EVAL, seed: int = 0, *, overwrite: bool = False
) -> Path:
    """Write train.json, eval.json, eval_blanked.json and their images; equal arguments give equal files.

    The files are in the official format: ``id``, ``image`` (a path relative to the file, a list, or a dictionary of
    ``<image_00>`` keys) and ``conversations``; ``task`` names the kind. The kinds take turns, so that a split holds
    them in equal parts, and every eight records of a kind ask for all eight colours.

    Args:
        out: folder to write; created when absent.
        train: number of training records.
        eval: number of held-out records; they share no image with training.
        seed: seed of everything random.
        overwrite: replace a previous result of this command instead of refusing the folder.

    Raises:
        FileExistsError: the folder holds something (that this command did not write), or the path is a file.
    """
    folder = start_folder(Path(out), _readme(train, eval, seed), overwrite=overwrite)
    (folder / "images").mkdir()
    for split, count in (("train", train), ("eval", eval)):
        records = []
        for index in range(count):
            record, images = build_record(split, index, seed)
            records.append(record)
            for path, image in images.items():
                image.save(folder / path)
        _write_records(folder / f"{split}.json", records)
    write_blanked(folder / "eval.json")
    return folder


def write_blanked(data: Path | str) -> Path:
    """Write ``<name>_blanked.json``, a copy whose images are uniform grey of the same size, and return its path.

    A model that still answers correctly on it does not use the images.

    Args:
        data: JSON file of ``write_demo_dataset``; the grey images go to ``images_blanked`` beside it.
    """
    data = Path(data)
    folder = data.parent
    (folder / "images_blanked").mkdir(exist_ok=True)

    def blank(path: str) -> str:
        twin = f"images_blanked/{Path(path).name}"
        with Image.open(folder / path) as image:
            Image.new("RGB", image.size, (GREY, GREY, GREY)).save(folder / twin)
        return twin

    records = json.loads(data.read_text(encoding="utf-8"))
    for record in records:
        record["image"] = _map_paths(record["image"], blank)
    twin = data.with_name(f"{data.stem}_blanked.json")
    _write_records(twin, records)
    return twin


def build_record(split: str, index: int, seed: int) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """One record and its images by relative path; they depend on the three arguments alone."""
    task = TASKS[index % len(TASKS)]
    rng = random.Random(f"{seed} {split} {index}")
    nth = index // len(TASKS)
    # The same shuffle for eight records of a kind: together they ask for every colour once.
    order = random.Random(f"{seed} {split} {task} {nth // len(COLOURS)}").sample(list(COLOURS), len(COLOURS))
    images, turns = _BUILDERS[task](rng, order[nth % len(COLOURS)])
    name = f"{split}-{index:05d}"
    paths = {f"images/{name}-{number}.png": image for number, image in enumerate(images)}
    record = {
        "id": name,
        "image": _image_entry(list(paths), turns[0][0]),
        "conversations": [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ],
        "task": task,
    }
    return record, paths


def draw_square(rng: random.Random, size: tuple[int, int], colour: str) -> Image.Image:
    """A square of the colour, of random side and place, on grey noise; ``size`` is (width, height) in pixels."""
    image = _noise(rng, size)
    side = rng.randint(min(size) * 3 // 8, min(size) * 3 // 4)
    place = (rng.randint(0, size[0] - side), rng.randint(0, size[1] - side))
    strong = tuple(GREY + 126 if channel else GREY - 126 for channel in COLOURS[colour])
    image.paste(Image.new("RGB", (side, side), strong), place)
    return image


def draw_dots(rng: random.Random, size: tuple[int, int], colour: str) -> Image.Image:
    """A field of one-pixel dots of the colour on grey noise; ``size`` is (width, height) in pixels.

    Every 2 x 2 cell of the field averages to GREY, so an image at half the resolution shows a plain grey field.
    """
    image = _noise(rng, size)
    signs = tuple(1 if channel else -1 for channel in COLOURS[colour])
    around = tuple(GREY - _OPPOSITE * sign for sign in signs)
    dot = tuple(GREY + 3 * _OPPOSITE * sign for sign in signs)
    width, height = (2 * rng.randint(side * 3 // 16, side * 3 // 8) for side in size)
    left, top = 2 * rng.randint(0, (size[0] - width) // 2), 2 * rng.randint(0, (size[1] - height) // 2)
    cell = Image.new("RGB", (2, 2), around)
    cell.putpixel((0, 0), dot)
    image.paste(_tiled(cell, (width, height)), (left, top))
    return image


def _tiled(cell: Image.Image, size: tuple[int, int]) -> Image.Image:
    """``cell`` repeated over an image of ``size`` (width, height)."""
    pixels = cell.tobytes()
    row = 3 * cell.width
    lines = [pixels[start : start + row] * (size[0] // cell.width) for start in range(0, len(pixels), row)]
    return Image.frombytes("RGB", size, b"".join(lines) * (size[1] // cell.height))


def _noise(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Grey noise in cells of 7 x 7 pixels (coarse, so that the files stay small)."""
    cells = (-(-size[0] // _NOISE_CELL), -(-size[1] // _NOISE_CELL))
    values = bytes(rng.randint(GREY - _NOISE, GREY + _NOISE) for _ in range(cells[0] * cells[1]))
    small = Image.frombytes("L", cells, values)
    large = small.resize((cells[0] * _NOISE_CELL, cells[1] * _NOISE_CELL), Image.Resampling.NEAREST)
    return large.crop((0, 0, *size)).convert("RGB")


def _single(rng: random.Random, colour: str) -> Drawn:
    return [draw_square(rng, rng.choice(PLAIN_SIZES), colour)], [(f"<image>\n{SQUARE_QUESTION}", colour)]


def _sliced(rng: random.Random, colour: str) -> Drawn:
    return [draw_dots(rng, DOTS_SIZE, colour)], [(f"<image>\n{DOTS_QUESTION}", colour)]


def _multi_image(rng: random.Random, colour: str) -> Drawn:
    images, colours = _two_squares(rng, colour)
    tags = rng.choice(("<image>\n<image>", "<image_00>\n<image_01>"))
    return images, [(f"{tags}\n{SQUARES_QUESTION}", SQUARES_ANSWER.format(*colours))]


def _multi_turn(rng: random.Random, colour: str) -> Drawn:
    images, colours = _two_squares(rng, colour)
    return images, [(f"<image_{turn:02d}>\n{SQUARE_QUESTION}", each) for turn, each in enumerate(colours)]


def _two_squares(rng: random.Random, colour: str) -> tuple[list[Image.Image], list[str]]:
    """Two images and their colours, which differ, so that mixing the images up is a mistake."""
    colours = [colour, rng.choice([other for other in COLOURS if other != colour])]
    return [draw_square(rng, rng.choice(PLAIN_SIZES), each) for each in colours], colours


def _image_entry(paths: list[str], question: str) -> Any:
    """The ``image`` entry in the form that the question needs: keys, a list or a path."""
    if "<image_00>" in question:
        return {f"<image_{number:02d}>": path for number, path in enumerate(paths)}
    return paths if len(paths) > 1 else paths[0]


def _map_paths(image: Any, function: Callable[[str], str]) -> Any:
    """Apply ``function`` to every path of an ``image`` entry, whatever its form."""
    if isinstance(image, dict):
        return {key: function(path) for key, path in image.items()}
    if isinstance(image, list):
        return [function(path) for path in image]
    return function(image)


def _readme(train: int, eval: int, seed: int) -> str:
    command = f"python -m finetune demo-data --train {train} --eval {eval} --seed {seed}"
    return (
        "# Demo data set\n\n"
        "Drawn squares and dots with questions about their colours, in the official JSON format.\n"
        f"eval_blanked.json is eval.json with grey images. Made by `{command}`.\n"
    )


def _write_records(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


_BUILDERS: dict[str, Callable[[random.Random, str], Drawn]] = {
    "single": _single,
    "sliced": _sliced,
    "multi_image": _multi_image,
    "multi_turn": _multi_turn,
}
TASKS = tuple(_BUILDERS)
