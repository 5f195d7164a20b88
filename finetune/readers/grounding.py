"""Grounding data in the format of ms-swift (``objects``): inserted as <ref>, <box> and <point> tags into the text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from finetune.data_files.json_values import json_cell, json_type, written
from finetune.media import image_files
from finetune.readers.record_keys import OBJECTS as KEY
from finetune.sample import DataError, Message, Sample, Text
from finetune.utils.quoting import shown, words_of

# Optionally inside existing tags; an element <bbox>...</bbox> is not a placeholder.
_NAME = r"(?P<ref><ref>)?<ref-object>(?(ref)</ref>)"
_BOX = r"(?P<mark><(?P<tag>box|point)>)?<bbox>(?![^<]*</bbox>)(?(mark)</(?P=tag)>)"
_PLACE = re.compile(rf"{_NAME}|{_BOX}")

_TYPES = {"real": "real", "norm1": "norm1", "norm_1": "norm1", "norm1000": "norm1000", "norm_1000": "norm1000"}
_COLUMNS = ("ref", "bbox", "bbox_type", "image_id")
_ENTRY = {**{name: name for name in _COLUMNS}, "caption": "ref", "image": "image_id"}


@dataclass(frozen=True, slots=True)
class _Box:
    """A box, or a point.

    Attributes:
        name: name of the box for errors.
        values: x and y of a point, or of two corners.
        unit: one of the values of _TYPES; None if not given.
        image: index of the image.
    """

    name: str
    values: tuple[float, ...]
    unit: str | None
    image: int


class _Objects(NamedTuple):
    """The names, and the boxes of each placeholder."""

    names: list[str]
    boxes: list[list[_Box]]


def ground(record: Mapping[str, Any], sample: Sample) -> Sample:
    """The sample with the names and boxes of its record inserted into the text.

    ``<ref-object>`` and ``<bbox>`` are replaced by the next name and the next box of ``objects``, in any turn:
    ``<ref>name</ref>``, ``<box>x1 y1 x2 y2</box>``, for two numbers ``<point>x y</point>``, with coordinates from 0 to
    1000 relative to the image with EXIF orientation applied.

    Args:
        record: the record with the objects.
        sample: its sample, with images.

    Raises:
        DataError: numbers of placeholders and objects differ, or a box is outside of its image or in unknown units.
    """
    given = json_cell(record.get(KEY))
    if not given and not any("<ref-object>" in text or "<bbox>" in text for text in _texts(sample)):
        return sample
    places = [found[0] for text in _texts(sample) for found in _PLACE.finditer(text)]
    if not places and not given:
        return sample
    if not places:
        note = f"{KEY!r} has names or boxes, but the text has no <ref-object> or <bbox> placeholder"
        return replace(sample, notes=(*sample.notes, note))
    if not given:
        kinds = " and ".join(kind for kind in ("<ref-object>", "<bbox>") if any(kind in place for place in places))
        note = f"grounding placeholders kept as text, since there is no {KEY!r}: {kinds}"
        return replace(sample, notes=(*sample.notes, note))
    objects = _objects(given)
    _check_counts(places, objects, isinstance(given, (list, tuple)))
    size = cache(lambda number: _size(sample, number))
    boxes = _in_thousandths(objects, size) if any("<bbox>" in place for place in places) else []
    names, queue = iter(objects.names), iter(boxes)
    messages = tuple(replace(message, parts=tuple(_filled(message, names, queue))) for message in sample.messages)
    turned = boxes and any(box.unit in (None, "real") and size(box.image)[1] for each in objects.boxes for box in each)
    note = "boxes in pixels of images with an EXIF orientation are taken relative to the rotated image"
    return replace(sample, messages=messages, notes=(*sample.notes, note) if turned else sample.notes)


def _texts(sample: Sample) -> Iterator[str]:
    return (part.text for message in sample.messages for part in message.parts if isinstance(part, Text))


def _filled(message: Message, names: Iterator[str], boxes: Iterator[str]) -> Iterator[Any]:
    def mark(place: re.Match[str]) -> str:
        if "<bbox>" not in place[0]:
            return f"<ref>{next(names)}</ref>"
        found = next(boxes)
        # Existing tags are kept; each of several boxes has its own tag.
        return found if place["tag"] is None else re.sub(r"(</?)(?:box|point)>", rf"\1{place['tag']}>", found)

    for part in message.parts:
        yield Text(_PLACE.sub(mark, part.text)) if isinstance(part, Text) else part


def _check_counts(places: Sequence[str], objects: _Objects, paired: bool) -> None:
    """Checks the numbers of placeholders against names and boxes; of objects with both, one may be unused."""
    counts = []
    for place, have in (("<ref-object>", len(objects.names)), ("<bbox>", len(objects.boxes))):
        wanted = sum(place in each for each in places)
        if wanted != have and not (paired and not wanted):
            what = "boxes" if place == "<bbox>" else "names"
            counts.append(f"{wanted} {place} in the text, {have} {what} in {KEY!r}")
    if counts:
        raise DataError(f"{'; '.join(counts)}; the numbers must be equal, in the order of the text")


def _objects(given: Any) -> _Objects:
    """The objects of a record: lists of names and boxes, or a list of objects with both."""
    if isinstance(given, Mapping):
        _check_keys(given, _COLUMNS)
        names, boxes, images = (_column(given, key) for key in ("ref", "bbox", "image_id"))
        if images and len(images) != len(boxes):
            raise DataError(f"{KEY!r} has {len(boxes)} boxes and {len(images)} 'image_id'; give one to each")
        entries = [
            {"bbox": box, "bbox_type": given.get("bbox_type"), "image_id": image}
            for box, image in zip(boxes, images or [0] * len(boxes), strict=True)
        ]
    elif isinstance(given, (list, tuple)) and all(isinstance(each, Mapping) for each in given):
        for each in given:
            _check_keys(each, tuple(_ENTRY))
        entries = [{_ENTRY[key]: value for key, value in each.items()} for each in given]
        names = [each["ref"] for each in entries if each.get("ref") is not None]
    else:
        raise DataError(f"{KEY!r} is {json_type(given)}; it must be an object with 'ref' and 'bbox'")
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise DataError(f"{KEY!r}, name {number} is {json_type(name)}; it must be a string")
    return _Objects(names, [_boxes(each, number) for number, each in enumerate(entries)])


def _column(given: Mapping[str, Any], key: str) -> list[Any]:
    value = given.get(key)
    if value is not None and not isinstance(value, (list, tuple)):
        raise DataError(f"{KEY!r} has {json_type(value)} under {key!r}; it must be a list")
    return list(value or ())


def _check_keys(given: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise DataError(f"{KEY!r} has {words_of(unknown)}; known are {', '.join(known)}; remove it")


def _boxes(entry: Mapping[str, Any], number: int) -> list[_Box]:
    """The boxes of a placeholder; older files may have several."""
    given, image, unit = entry.get("bbox"), entry.get("image_id") or 0, entry.get("bbox_type")
    if unit is not None and unit not in _TYPES:
        raise DataError(
            f"{KEY!r}, box {number}: 'bbox_type' is {written(unit)}; there are real (pixels), norm1 (0 to 1) "
            "and norm1000 (0 to 1000)"
        )
    if not isinstance(image, int) or image < 0:
        raise DataError(f"{KEY!r}, box {number}: 'image_id' is {written(image)}; images count from 0")
    unit = None if unit is None else _TYPES[unit]
    nested = isinstance(given, (list, tuple)) and len(given) > 0 and isinstance(given[0], (list, tuple))
    boxes: list[Any] = [*given] if nested and given else [given]
    return [_box(each, number, unit, image) for each in boxes]


def _box(given: Any, number: int, unit: str | None, image: int) -> _Box:
    name = f"{KEY!r}, box {number} ({written(given)})"
    values = tuple(given) if isinstance(given, (list, tuple)) else ()
    if len(values) not in (2, 4) or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise DataError(f"{name}: must be two or four numbers, [x, y] or [x1, y1, x2, y2]")
    return _Box(name, values, unit, image)


def _in_thousandths(objects: _Objects, size: Any) -> list[str]:
    """The text for each box placeholder."""
    every = [box for each in objects.boxes for box in each]
    inside = [box for box in every if all(0 <= value <= 1 for value in box.values)]
    unsaid = [box for box in inside if box.unit is None]
    wrong = [box for box in inside if box.unit == "real" and any(value % 1 for value in box.values)]
    if wrong or (unsaid and len(unsaid) == len(every)):
        box = (wrong or unsaid)[0]
        said = "is within 0 and 1, and 'bbox_type' says pixels" if wrong else "is within 0 and 1, without 'bbox_type'"
        raise DataError(f'{box.name}: {said}; write "bbox_type": "norm1", or coordinates in pixels ("real")')
    return ["".join(_mark(box, size) for box in each) for each in objects.boxes]


def _mark(box: _Box, size: Any) -> str:
    """The tag of one box."""
    width, height = {"norm1": (1, 1), "norm1000": (1000, 1000)}.get(box.unit or "") or size(box.image)[0]
    values = [round(value * 1000 / side) for value, side in zip(box.values, (width, height) * 2, strict=False)]
    if any(not 0 <= value <= 1000 for value in values):
        where, fix = f"0 and {width}", "correct it, or its 'bbox_type'"
        if box.unit in (None, "real"):
            where = f"image {box.image}, upright {width} x {height} pixels"
        if box.unit is None:
            fix = 'correct it, or write "bbox_type": "norm1000" if coordinates are of 0 to 1000'
        raise DataError(f"{box.name}: is not within {where}; {fix}")
    if len(values) == 4 and (box.values[0] > box.values[2] or box.values[1] > box.values[3]):
        raise DataError(
            f"{box.name}: its second corner is above or left of the first; write [x1, y1, x2, y2] from top "
            "left to bottom right (not x, y, width, height)"
        )
    tag = "box" if len(values) == 4 else "point"
    return f"<{tag}>{' '.join(map(str, values))}</{tag}>"


def _size(sample: Sample, number: int) -> tuple[tuple[int, int], bool]:
    """(width, height) of an image with EXIF orientation applied, and whether the orientation changes the image."""
    images = list(sample.media("image"))
    if number >= len(images):
        raise DataError(
            f"{KEY!r} has a box in image {number} in pixels, and the record has {len(images)} images; "
            "correct 'image_id' or 'bbox_type'"
        )
    data = images[number].data
    if isinstance(data, Image.Image):
        return image_files.upright_size(data)
    assert isinstance(data, Path)
    try:
        with image_files.open_image(data) as image:
            return image_files.upright_size(image)
    except (image_files.UnreadableError, OSError) as error:
        raise DataError(f"image {shown(str(data))}: its size cannot be read ({error})") from error
