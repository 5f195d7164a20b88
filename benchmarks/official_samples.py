"""Reimplementation of the sample preprocessing of the published MiniCPM-Llama3-V 2.5 finetuning code.

This is a re-creation of the algorithm of the vendor's dataset class, not its code; the benchmarks measure against it
where no checkout of that code is given. What it keeps is which work is done, and on what:

* the file is opened and converted to RGB, copied once before the thumbnail is made, resized by Pillow's bicubic filter;
* every item becomes a float32 tensor by ToTensor and Normalize, and is cut into patches by ``unfold``;
* the prompt is one text with every placeholder spelled out; the chat template is rendered twice, as text and as ids;
* answers are found in the ids by their headers, targets are set one by one in a loop over tensors;
* bounds of images are searched in the ids.

Targets are shifted by one, as the published trainer takes them, and values are float32, three channels by patch height
by all patches side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mix import PATCH, QUERIES, RESOLUTION, SLICES
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor
from transformers import PreTrainedTokenizerFast

from finetune.encoding.example import Example

Turns = Sequence[Mapping[str, str]]
TRANSFORM = Compose([ToTensor(), Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
_TEMPLATE = (
    "{% for turn in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\n\n' + (turn['content'] | trim) + '<|eot_id|>' }}"
    "{% endfor %}"
)


class OfficialSamples:
    """Records of one image each to tensors, as the vendor's dataset class gives them.

    Args:
        records: of the official form.
        tokenizer: of MiniCPM-Llama3-V 2.5.
        queries: placeholders per item.
        resolution: side of the square whose area a slice should have.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerFast,
        queries: int = QUERIES,
        resolution: int = RESOLUTION,
    ) -> None:
        self.records = records
        self.tokenizer = tokenizer
        self.queries = queries
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        picture = Image.open(record["image"]).convert("RGB")
        items, grid = cut(picture, self.resolution)
        pixels: list[torch.Tensor] = [torch.as_tensor(TRANSFORM(item)) for item in items]
        made = conversation_to_ids(with_placeholders(record["conversations"], grid, self.queries), self.tokenizer)
        patches = [unfolded(each) for each in pixels]
        sizes = torch.tensor([(each.shape[1] // PATCH, each.shape[2] // PATCH) for each in pixels], dtype=torch.int32)
        mask = torch.ones_like(made["input_ids"], dtype=torch.bool)
        return {**made, "attention_mask": mask, "pixel_values": patches, "tgt_sizes": sizes}


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: the text side padded and cut at 2048, the rest as lists."""
    batch: dict[str, Any] = {}
    for name, filler in (("input_ids", 0), ("position_ids", 0), ("labels", -100), ("attention_mask", 0)):
        rows = [sample[name][:2048] for sample in samples]
        batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
    return batch | {name: [each[name] for each in samples] for name in ("image_bound", "tgt_sizes", "pixel_values")}


def strips(example: Example) -> list[torch.Tensor]:
    """The pixels of one of our examples as the published code has them: per item (3, P, patches * P) float32."""
    items = example.patches.split(example.tgt_sizes.prod(1).tolist())
    squares = [item.reshape(-1, 3, PATCH, PATCH).permute(1, 2, 0, 3).reshape(3, PATCH, -1) for item in items]
    return [square.float().div(255).sub(0.5).div(0.5) for square in squares]


def cut(picture: Image.Image, resolution: int = RESOLUTION) -> tuple[list[Image.Image], tuple[int, int] | None]:
    """Thumbnail and slices of a picture, and columns and rows of the grid; None where it is not cut."""
    width, height = picture.size
    count = min(math.ceil(width * height / resolution**2), SLICES)
    if count <= 1:
        return [picture.resize(fitted(width, height, resolution), Image.Resampling.BICUBIC)], None
    thumbnail = picture.copy().resize(fitted(width, height, resolution), Image.Resampling.BICUBIC)
    numbers = [number for number in (count - 1, count, count + 1) if 1 < number <= SLICES]
    grids = [
        (columns, number // columns) for number in numbers for columns in range(1, number + 1) if number % columns == 0
    ]
    wanted = math.log(width / height)
    columns, rows = min(grids, key=lambda grid: abs(wanted - math.log(grid[0] / grid[1])))
    cell = fitted(_multiple(width, columns) / columns, _multiple(height, rows) / rows, resolution)
    refined = picture.resize((cell[0] * columns, cell[1] * rows), Image.Resampling.BICUBIC)
    corners = [(column * cell[0], row * cell[1]) for row in range(rows) for column in range(columns)]
    return [thumbnail, *(refined.crop((x, y, x + cell[0], y + cell[1])) for x, y in corners)], (columns, rows)


def with_placeholders(turns: Turns, grid: tuple[int, int] | None, queries: int = QUERIES) -> list[dict[str, str]]:
    """The conversation with its <image> spelled out."""
    item = "<image>" + "<unk>" * queries + "</image>"
    image = item
    if grid is not None:
        columns, rows = grid
        image += "<slice>" + "\n".join(item * columns for _ in range(rows)) + "</slice>"
    first, *others = [dict(turn) for turn in turns]
    first["content"] = first["content"].replace("<image>", image)
    return [first, *others]


def conversation_to_ids(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Ids, shifted targets, position ids and bounds of images, of a conversation with its placeholders."""
    raw = tokenizer.apply_chat_template(turns, chat_template=_TEMPLATE, tokenize=False)
    encoded = tokenizer.apply_chat_template(turns, chat_template=_TEMPLATE, tokenize=True, return_dict=False)
    found = np.array(encoded)
    prompt = _prompt_mask(found, tokenizer)
    ids, context = torch.from_numpy(found.astype(np.int32)), torch.from_numpy(prompt)
    end, opening, closing = (_id(tokenizer, name) for name in ("<|eot_id|>", "<image>", "</image>"))
    targets = torch.full_like(ids, -100)
    for at in range(1, len(ids)):
        if context[at] == 0:
            targets[at - 1] = ids[at]
        if context[at] == 1 and context[at - 1] == 0:
            targets[at - 1] = end
    starts = torch.where(ids == opening)[0] + 1
    ends = torch.where(ids == closing)[0]
    bounds = torch.hstack([starts.unsqueeze(-1), ends.unsqueeze(-1)])
    positions = torch.arange(len(ids))
    return {"input_ids": ids, "labels": targets, "image_bound": bounds, "position_ids": positions, "raw": raw}


def _prompt_mask(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """1 where there is no loss, 0 in answers and their end marks."""
    names = ("<|start_header_id|>", "assistant", "<|end_header_id|>", "<|eot_id|>")
    opened, role, closed, ended = (np.where(ids == _id(tokenizer, name))[0] for name in names)
    mask = np.ones(len(ids), np.int8)
    headers = set((opened + closed) / 2)
    for at in role:
        if at in headers:
            first = at + 3
            last = next((end for end in ended if end > first), None)
            if last is not None:
                mask[first : last + 1] = 0
    return mask


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def unfolded(values: torch.Tensor) -> torch.Tensor:
    """(3, H, W) to (3, P, H * W / P), the patches side by side."""
    columns = torch.nn.functional.unfold(values, (PATCH, PATCH), stride=(PATCH, PATCH))
    return columns.reshape(3, PATCH, PATCH, -1).permute(0, 1, 3, 2).reshape(3, PATCH, -1)


def fitted(width: float, height: float, resolution: int) -> tuple[int, int]:
    """Width and height in whole patches of about the area of a square, with the shape of a picture."""
    aspect = width / height
    tall = int(resolution / math.sqrt(aspect))
    return _multiple(int(tall * aspect), PATCH), _multiple(tall, PATCH)


def _multiple(length: float, step: int) -> int:
    return max(round(length / step) * step, step)
