"""The networks. Importing this package registers them and their tokenizers with transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from finetune.errors import CheckpointError
from finetune.models.configuration import MiniCPMVConfig
from finetune.models.loading import load_model
from finetune.models.minicpmv import MiniCPMV, MiniCPMVOutput
from finetune.models.tokenization import load_tokenizer, register

AutoConfig.register(MiniCPMVConfig.model_type, MiniCPMVConfig)
AutoModel.register(MiniCPMVConfig, MiniCPMV)
AutoModelForCausalLM.register(MiniCPMVConfig, MiniCPMV)
register()

__all__ = ["CheckpointError", "MiniCPMV", "MiniCPMVConfig", "MiniCPMVOutput", "load_model", "load_tokenizer"]
