"""Image placeholders in prompts: token runs whose embeddings the vision features replace."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from finetune.media.slicing import SlicePlan, item_sizes
from finetune.media.video_sampling import Frames
from finetune.templates.prompt_types import PromptLayout, PromptTokenizer


class PlaceholderBlock(NamedTuple):
    """The placeholder tokens of one image.

    Attributes:
        ids: token ids.
        bounds: half-open range of the placeholders of each visual item, relative to the first id.
    """

    ids: list[int]
    bounds: list[tuple[int, int]]


def old_schema(plan: SlicePlan, layout: PromptLayout, tokenizer: PromptTokenizer) -> PlaceholderBlock:
    """MiniCPM-V 2.0 and 2.5: <image>...</image> per item, the grid inside <slice>...</slice>.

    Rows of the grid are separated by a newline.
    """
    image, image_end, unknown = (tokenizer.control(token) for token in ("<image>", "</image>", "<unk>"))
    query_num = layout.query_num
    item = [image, *[unknown] * query_num, image_end]
    ids, starts = item, [1]
    if plan.grid is not None:
        columns, rows = plan.grid
        newline = tokenizer.fixed("\n")
        row = item * columns
        ids = [
            *item,
            tokenizer.control("<slice>"),
            *row,
            *(newline + row) * (rows - 1),
            tokenizer.control("</slice>"),
        ]
        first, step = len(item) + 1, len(row) + len(newline)
        starts += [first + line * step + place * len(item) + 1 for line in range(rows) for place in range(columns)]
    return PlaceholderBlock(ids, [(start, start + query_num) for start in starts])


def new_schema(plan: SlicePlan, number: int, layout: PromptLayout, tokenizer: PromptTokenizer) -> PlaceholderBlock:
    """MiniCPM-V 2.6 and later: <image_id>, <image> for the thumbnail, <slice> per slice; newlines between grid rows.

    With ``image_ids`` every image has a number, sliced or not, as in the published inference code.
    """
    block = PlaceholderBlock([], [])
    placeholder = tokenizer.control(layout.placeholder)
    if layout.image_ids:
        opening, closing = tokenizer.control("<image_id>"), tokenizer.control("</image_id>")
        block.ids.extend((opening, *tokenizer.fixed(str(number)), closing))

    def item(kind: str, size: tuple[int, int]) -> None:
        start, tokens = len(block.ids) + 1, layout.item_tokens(*size)
        run = [placeholder] * tokens
        block.ids.extend((tokenizer.control(f"<{kind}>"), *run, tokenizer.control(f"</{kind}>")))
        block.bounds.append((start, start + tokens))

    thumbnail, *slices = item_sizes(plan)
    item("image", thumbnail)
    columns = plan.grid[0] if plan.grid else 1
    for index, size in enumerate(slices):
        if index and index % columns == 0:
            block.ids.extend(tokenizer.fixed("\n"))
        item("slice", size)
    return block


def frame_schema(plan: SlicePlan, frames: Frames, layout: PromptLayout, tokenizer: PromptTokenizer) -> PlaceholderBlock:
    """As ``new_schema`` for a group of video frames, which share placeholders.

    With ``video_ids`` the number of the video precedes its first frame.
    """
    numbered = layout.video_ids and frames.opens
    own = replace(layout, placeholder=layout.video_placeholder or layout.placeholder, image_ids=numbered)
    return new_schema(plan, frames.video, own, tokenizer)
