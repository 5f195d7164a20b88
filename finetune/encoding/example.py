"""``Example``: the tensors of one encoded sample, between encoder and collator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from finetune.encoding.text_inputs import TextTensors, text_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch

    from finetune.encoding.alignment import DecodedMedia
    from finetune.templates.prompt_types import TokenizedPrompt


def _no_bounds() -> torch.Tensor:
    import torch  # not at the top: a check of data makes no tensor

    return torch.zeros(0, 2, dtype=torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One encoded sample: L tokens, n visual items with N patches in total, and m audio placeholder runs.

    Packed video frames form groups of neighbouring items that share placeholders; g is the number of groups, n without
    packed frames.

    Attributes:
        input_ids: (L,) int64.
        labels: (L,) int64, not shifted, -100 = no loss; the first one is always -100.
        position_ids: (L,) int64, from 0.
        patches: (N, 3*P*P), P = patch size; each row one patch in (channel, row, column) order, items one after
            another, patches of an item row by row. uint8, normalised in the model (x / 255, mean 0.5, std 0.5); or
            float32, normalised, where the family uses the image processor of transformers.
        tgt_sizes: (n, 2) int64, rows and columns of patches per item; their products add up to N.
        image_bound: (g, 2) int64, half-open token range of each group's placeholders.
        temporal_ids: (n,) int64, time index of a packed video frame, -1 for a still image.
        group_sizes: (g,) int64, items per group; None when every item is its own group.
        from_video: (n,) bool, whether an item comes from a video, for models with separate video inputs; else None.
        loss_weights: (L,) float32, weight of every label in the loss; None for 1.
        audio: log-mel features, (bins, T) float32 per chunk; long clips have several chunks, in order.
        audio_bound: (m, 2) int64, half-open token range of each audio placeholder run; the chunks fill the runs in
            order.
        source: file and record of the sample, for messages.
        inputs: format of the pixel inputs, a key of ``finetune.encoding.pixel_inputs.INPUTS``.
        rejected: in a preference pair the example with the rejected answer. Its media are those of this one.
        borrows_media: whether its media are collated once, with the example of the chosen answer.
        reference: log-probabilities of both answers by the reference model, if they were computed beforehand.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    patches: torch.Tensor
    tgt_sizes: torch.Tensor
    image_bound: torch.Tensor
    temporal_ids: torch.Tensor
    source: str
    loss_weights: torch.Tensor | None = None
    audio: tuple[torch.Tensor, ...] = ()
    audio_bound: torch.Tensor = field(default_factory=_no_bounds)
    group_sizes: torch.Tensor | None = None
    from_video: torch.Tensor | None = None
    inputs: str = "patches"
    rejected: Example | None = None
    borrows_media: bool = False
    reference: tuple[float, float] | None = None


def example_of(
    rendered: TokenizedPrompt,
    media: DecodedMedia,
    *,
    loss_weights: Sequence[float] | None,
    from_video: bool,
    source: str,
    inputs: str,
) -> Example:
    """The tensors of a rendered sample and its decoded media.

    Args:
        rendered: token ids, labels and placeholder bounds.
        media: the decoded media.
        loss_weights: one per label, None for 1.
        from_video: whether the example has that field.
        source: as in ``Example``.
        inputs: as in ``Example``.
    """
    import torch  # not at the top: a check of data makes no tensor

    items = media.items
    return Example(
        **text_tensors(rendered),
        patches=torch.as_tensor(media.patches),
        tgt_sizes=torch.tensor(items.grids, dtype=torch.int64).reshape(-1, 2),
        temporal_ids=torch.tensor(items.times, dtype=torch.int64),
        group_sizes=torch.tensor(items.groups) if any(size > 1 for size in items.groups) else None,
        from_video=torch.tensor(items.video) if from_video else None,
        audio=media.log_mels,
        loss_weights=None if loss_weights is None else torch.tensor(loss_weights),
        source=source,
        inputs=inputs,
    )


def with_rejected(example: Example, answer: TextTensors) -> Example:
    """The example as the chosen one of a pair with ``answer``: the tensors of its prompt with the rejected answer."""
    return replace(example, rejected=replace(example, **answer, borrows_media=True))


def empty_example(pad_id: int, patches: np.ndarray, source: str, inputs: str) -> Example:
    """An example of one padding token without label or media.

    Args:
        pad_id: its token id.
        patches: (0, 3*P*P), in the dtype of the family.
        source: as in ``Example``.
        inputs: as in ``Example``.
    """
    import torch

    return Example(
        input_ids=torch.tensor([pad_id]),
        labels=torch.tensor([-100]),
        position_ids=torch.zeros(1, dtype=torch.int64),
        patches=torch.from_numpy(patches),
        tgt_sizes=torch.zeros(0, 2, dtype=torch.int64),
        image_bound=torch.zeros(0, 2, dtype=torch.int64),
        temporal_ids=torch.zeros(0, dtype=torch.int64),
        source=source,
        inputs=inputs,
    )
