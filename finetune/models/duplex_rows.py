"""The 24 rows that the full-duplex prompt o45_fc adds to embeddings and output layer of the published vocabulary."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.integrations import gather_params_ctx
from torch import nn

from finetune.model_folders.checkpoint_folder import has_adapter
from finetune.model_folders.duplex_prompt import O45_FC, prompt_of, recorded_as
from finetune.templates.duplex_fc import FIRST_ID, LAST_ID, NEW_TOKENS
from finetune.utils.errors import CheckpointError

logger = logging.getLogger(__name__)


def add_duplex_rows(model: Any) -> None:
    """Adds the rows to a model of the published vocabulary; one that has them already is not changed.

    Every new row is the mean of the published rows: an embedding within the spread of the others, and a logit that is
    the mean of all logits, so that the loss of other tokens hardly changes. transformers would draw them at random.

    Args:
        model: a MiniCPM-o 4.5 without adapters.
    """
    for key, value in recorded_as().items():
        setattr(model.config, key, value)
    if model.config.vocab_size == LAST_ID:
        return
    assert model.config.vocab_size == FIRST_ID, model.config.vocab_size
    model.resize_token_embeddings(LAST_ID, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        _set_to_mean(module.weight)
    logger.info(
        "%d rows added to embeddings and output layer (%d to %d), each the mean of the published ones: %s",
        len(NEW_TOKENS),
        FIRST_ID,
        LAST_ID - 1,
        " ".join(NEW_TOKENS),
    )


def rows_for(model: Any, adapter: Path) -> None:
    """Adds the rows to a model that gets an adapter which was trained with them.

    Args:
        model: a model without the adapter, possibly a PeftModel.
        adapter: its folder.

    Raises:
        CheckpointError: the model has other adapters, or another vocabulary.
    """
    if not has_adapter(adapter) or prompt_of(adapter) != O45_FC:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    if rows == LAST_ID:
        return
    if isinstance(model, PeftModel) or rows != FIRST_ID:
        other = "it has another adapter already: load this one first" if rows == FIRST_ID else "use its own base"
        raise CheckpointError(
            f"{adapter} was trained in the prompt {O45_FC} with {LAST_ID} rows of embeddings, the model has {rows}; "
            f"{other}"
        )
    add_duplex_rows(model)


def grow(weight: torch.Tensor) -> torch.Tensor:
    """Published rows (FIRST_ID, E) with the new ones, (LAST_ID, E)."""
    return torch.cat([weight, _mean(weight).expand(len(NEW_TOKENS), -1)])


def _mean(published: torch.Tensor) -> torch.Tensor:
    return published.mean(0, dtype=torch.float32).to(published.dtype)


def _set_to_mean(weight: nn.Parameter) -> None:
    with torch.no_grad(), gather_params_ctx([weight]):  # of ZeRO-3
        weight[FIRST_ID:] = _mean(weight[:FIRST_ID])
