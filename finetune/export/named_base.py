"""Checks a base that the user named for a merge in place of the one that the adapter was trained on."""

from __future__ import annotations

from pathlib import Path

from finetune.checkpoints.base_checkpoint import BaseCheckpoint
from finetune.export.lora_merge import empty_model
from finetune.model_folders.checkpoint_folder import CONFIG
from finetune.tokenizers.tokenization import load_tokenizer
from finetune.utils.errors import CheckpointError


def check_named_base(adapter: Path, trained_on: Path, base: BaseCheckpoint) -> None:
    """Refuses a base with other ids of tokens than the adapter's, or other shapes than the folder it was trained on.

    Args:
        adapter: its folder; without a tokenizer ids are not compared.
        trained_on: the base that it names, in 4 bit or whole; shapes are not compared where it is gone.
        base: the named one.

    Raises:
        CheckpointError: naming the first token or tensor that differs.
    """
    if (adapter / "tokenizer_config.json").is_file():
        own = load_tokenizer(adapter).get_vocab()
        other = load_tokenizer(base.folder, duplex_prompt=base.duplex_name).get_vocab()
        if differing := sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token)):
            first = differing[0]
            raise CheckpointError(
                f"{adapter} does not fit {base.folder}: the token {first!r} has id {other.get(first, 'none')} "
                f"there, {own.get(first, 'none')} beside the adapter ({len(differing)} tokens differ)"
            )
    if (trained_on / CONFIG).is_file():
        here, there = (
            {name: tuple(tensor.shape) for name, tensor in empty_model(folder).state_dict().items()}
            for folder in (trained_on, base.folder)
        )
        if differing := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
            first = differing[0]
            raise CheckpointError(
                f"{adapter} does not fit {base.folder}: {first} is {there.get(first, 'missing')} there, "
                f"{here.get(first, 'missing')} in {trained_on}, on which it was trained"
            )
