"""Model classes and loading. Importing this package registers models and tokenizers with transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from finetune.runtime.imports import optional_libraries_hidden

with optional_libraries_hidden():  # as it is imported, peft imports bitsandbytes where that is found
    import peft  # noqa: F401
from finetune.models.configuration import MiniCPMOConfig, MiniCPMVConfig
from finetune.models.loading import base_of, load_adapter, load_model
from finetune.models.minicpmo import MiniCPMO
from finetune.models.minicpmv import MiniCPMV, MiniCPMVOutput
from finetune.tokenizers.registration import register
from finetune.tokenizers.tokenization import load_tokenizer
from finetune.utils.errors import CheckpointError

for _config, _model in ((MiniCPMVConfig, MiniCPMV), (MiniCPMOConfig, MiniCPMO)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _model)
register()

__all__ = [
    "CheckpointError",
    "MiniCPMO",
    "MiniCPMOConfig",
    "MiniCPMV",
    "MiniCPMVConfig",
    "MiniCPMVOutput",
    "base_of",
    "load_adapter",
    "load_model",
    "load_tokenizer",
]
