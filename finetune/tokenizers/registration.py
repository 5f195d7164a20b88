"""Registers the tokenizer classes with AutoTokenizer, under the names in published tokenizer_config.json files.

Apart from ``tokenization``: AutoTokenizer imports torch, which a check of data does without.
"""

from __future__ import annotations

from typing import ClassVar

from transformers import AutoTokenizer, PretrainedConfig

from finetune.tokenizers.tokenization import MiniCPMOTokenizerFast, MiniCPMVTokenizer, MiniCPMVTokenizerFast


class _TokenizerOnly(PretrainedConfig):
    """Configuration class for the registration of the tokenizers.

    If they were registered for MiniCPMVConfig, ``trust_remote_code=True`` would load the code of the folder.
    """

    model_type: ClassVar[str] = "minicpmv_tokenizer_only"


class _OmniTokenizerOnly(_TokenizerOnly):
    """A second one, as a configuration can have two tokenizer classes at most."""

    model_type: ClassVar[str] = "minicpmo_tokenizer_only"


def register() -> None:
    """Registers the classes with AutoTokenizer by name, for model and adapter folders."""
    AutoTokenizer.register(
        _TokenizerOnly, slow_tokenizer_class=MiniCPMVTokenizer, fast_tokenizer_class=MiniCPMVTokenizerFast
    )
    AutoTokenizer.register(_OmniTokenizerOnly, fast_tokenizer_class=MiniCPMOTokenizerFast)
