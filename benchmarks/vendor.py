"""Loads the published dataset class from a checkout of its finetune folder, adapted to the installed transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mix
from official_samples import TRANSFORM
from transformers import PreTrainedTokenizerFast


class Tokenizer:
    """A tokenizer with the attributes that the vendor's tokenizer class adds, and ids as a list, as it used to be."""

    im_start, im_end, slice_start, slice_end = "<image>", "</image>", "<slice>", "</slice>"

    def __init__(self, wrapped: PreTrainedTokenizerFast) -> None:
        self._wrapped = wrapped
        self.unk_token = "<unk>"
        self.im_start_id = wrapped.convert_tokens_to_ids(self.im_start)
        self.im_end_id = wrapped.convert_tokens_to_ids(self.im_end)
        self.slice_start_id = wrapped.convert_tokens_to_ids(self.slice_start)
        self.slice_end_id = wrapped.convert_tokens_to_ids(self.slice_end)
        self.eot_id = wrapped.convert_tokens_to_ids("<|eot_id|>")
        self.convert_tokens_to_ids = wrapped.convert_tokens_to_ids

    def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> Any:
        """As of the wrapped tokenizer."""
        return self._wrapped.apply_chat_template(turns, **options, return_dict=False)


def load(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    config: Mapping[str, Any] = mix.CONFIG,
) -> tuple[Any, Callable[[list[dict[str, str]]], Mapping[str, Any]]]:
    """The vendor's dataset over the records, and its function from conversations to ids.

    Args:
        folder: its finetune folder, with dataset.py.
        records: of the official form, with one image each.
        tokenizer: of MiniCPM-Llama3-V 2.5.
        config: its config.json.
    """
    spec = importlib.util.spec_from_file_location("vendor_dataset", folder / "dataset.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder} has no dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = Tokenizer(tokenizer)
    dataset = module.SupervisedDataset(
        records,
        TRANSFORM,
        own,
        config["slice_config"],
        llm_type="llama3",
        patch_size=config["patch_size"],
        query_nums=config["query_num"],
        batch_vision=True,
    )
    return dataset, lambda turns: module.conversation_to_ids(turns, own, "llama3")
