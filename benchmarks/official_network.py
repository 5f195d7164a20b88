"""Reimplementation of the MiniCPM-Llama3-V 2.5 model as its published code computes it.

This is a re-creation of the algorithm, not the vendor's code. What it keeps is which work is done, and on what:

* visual items are padded to the longest of the micro-batch, as one-row images of float32, and go through a convolution;
* position ids of patches are made item by item; a mask of patches keeps the padding out;
* vision attention writes all scores out (the published vision code has that and FlashAttention, nothing between them),
  in the vision layers of transformers' Idefics2, from which the published model takes them;
* the resampler pads keys and values and calls torch's MultiheadAttention with a mask, weights included;
* logits of every position, in float32.

One fault of the published code is left out, as losses have to agree: its mask hides nothing of a shorter item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from finetune.models import MiniCPMV

_HEAD_DIM = 128


class OfficialNetwork(nn.Module):
    """The published forward pass with the weights, and the language model, of one of our networks.

    Args:
        model: MiniCPM-Llama3-V 2.5, of any size.
    """

    accepts_loss_kwargs = True  # as the Trainer asks: the loss is divided by num_items_in_batch

    def __init__(self, model: MiniCPMV) -> None:
        super().__init__()
        self.config, self.llm = model.config, model.llm
        given: dict[str, Any] = {**self.config.vision_config, "attn_implementation": "eager"}
        settings = Idefics2VisionConfig(**given)
        self.vpm = Idefics2VisionTransformer(settings)
        self.vpm.load_state_dict(model.vpm.state_dict())
        self.resampler = _Resampler(self.config.query_num, self.config.hidden_size, settings.hidden_size)
        self.resampler.load_state_dict(model.resampler.state_dict())

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        pixel_values: Sequence[Sequence[torch.Tensor]],
        tgt_sizes: Sequence[torch.Tensor],
        image_bound: Sequence[torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
    ) -> dict[str, torch.Tensor]:
        """The loss of a batch of official_samples.collate; the published code hands no mask to the language model."""
        embeddings = self.llm.model.embed_tokens(input_ids.long())
        sizes = torch.cat([each.long() for each in tgt_sizes])
        features = iter(self._features([strip for row in pixel_values for strip in row], sizes))
        for row, bounds in enumerate(image_bound):
            places = torch.cat([torch.arange(first, last) for first, last in bounds.tolist()]).to(input_ids.device)
            seen = torch.cat([next(features) for _ in bounds])
            embeddings = embeddings.index_put((torch.full_like(places, row), places), seen.to(embeddings.dtype))
        logits = self.llm(inputs_embeds=embeddings, position_ids=position_ids, use_cache=False).logits.float()
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.reshape(-1).long(), reduction="sum")
        return {"loss": loss / num_items_in_batch}

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Runs layers of the language model and the vision tower again, not reentrant; the published script has that.

        The Trainer hands over what it was given, which is the default in every case.
        """
        for part in (self.llm, self.vpm):
            part.gradient_checkpointing_enable({"use_reentrant": False})

    def _features(self, strips: Sequence[torch.Tensor], sizes: torch.Tensor) -> torch.Tensor:
        """Strips (3, P, patches * P) of all items and their (n, 2) rows and columns to (n, queries, E)."""
        counts = sizes.prod(1)
        side = strips[0].shape[1]
        flat = pad_sequence([strip.flatten(0, 1).transpose(0, 1) for strip in strips], batch_first=True)
        pixels = flat.transpose(1, 2).unflatten(1, (3, side))
        real = torch.zeros(len(strips), 1, int(counts.max()), dtype=torch.bool, device=pixels.device)
        for item, count in enumerate(counts.tolist()):
            real[item, 0, :count] = True
        return self.resampler(self.vpm(pixels, patch_attention_mask=real).last_hidden_state, sizes)


class _Resampler(nn.Module):
    """Cross attention over padded items."""

    def __init__(self, queries: int, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.query = nn.Parameter(torch.empty(queries, size))
        self.kv_proj = nn.Linear(width, size, bias=False)
        self.attn = nn.MultiheadAttention(size, size // _HEAD_DIM)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(size, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(size, size))
        self.table: torch.Tensor
        self.register_buffer("table", _sincos(70, size), persistent=False)

    def forward(self, features: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """(n, L, width) and (n, 2) to (n, queries, E)."""
        items, longest = features.shape[:2]
        padding = torch.zeros(items, longest, dtype=torch.bool, device=features.device)
        places = []
        for item, (rows, columns) in enumerate(sizes.tolist()):
            places.append(self.table[:rows, :columns].reshape(rows * columns, -1))
            padding[item, rows * columns :] = True
        positions = pad_sequence(places).to(features.dtype)  # (L, n, E), as the attention wants it
        value = self.ln_kv(self.kv_proj(features)).transpose(0, 1)
        query = self.ln_q(self.query)[:, None].repeat(1, items, 1)
        found = self.attn(query, value + positions, value, key_padding_mask=padding)[0]
        return self.ln_post(found.transpose(0, 1)) @ self.proj


def _sincos(side: int, size: int) -> torch.Tensor:
    """(side, side, size): the column in the first half, the row in the second, sines before cosines."""
    frequencies = 1 / 10000 ** (torch.arange(size // 4, dtype=torch.float64) / (size / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = axis[None, :].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], 2).float()
