"""Networks of the published layout with random weights: real vocabulary, hidden size 256, head size 128, two layers.

What is published with a checkpoint besides its weights (config.json, tokenizer, processor, code files) comes from a
folder named by VENDOR_CODE, with a folder for each family, such as VENDOR_CODE/v2_6. It is never committed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

import finetune.models  # noqa: F401  registers the model classes
from finetune.families import by_name
from finetune.tiny.chatml_tokenizers import THINKING, TURN_MARKS
from finetune.tiny.checkpoint_writer import write_tiny_checkpoint
from finetune.tiny.native_folders import MEDIA_TOKENS
from finetune.tokenizers.byte_bpe_tokenizer import from_vocabulary

# Families whose networks transformers has; of theirs nothing is needed but a vocabulary, that of 4.5.
NATIVE = ("v4_6", "v4_7")
VOCABULARY_OF_NATIVE = "v4_5"
_LANGUAGE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
}
_VISION = {"hidden_size": 144, "intermediate_size": 288, "num_attention_heads": 2, "num_hidden_layers": 2}
_AUDIO = {"d_model": 64, "encoder_attention_heads": 1, "encoder_ffn_dim": 256, "encoder_layers": 1}
_LINEAR = {
    "head_dim": 128,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_value_head_dim": 128,
}
# A quarter of the head rotates: 16 frequencies.
_MROPE = [6, 5, 5]
# Logits so far apart that rounding turns no answer.
_SPREAD = {"llm.lm_head.weight": 4.0, "llm.model.embed_tokens.weight": 10.0}
_SPREAD |= {"model.language_model.embed_tokens.weight": 1.5}


def published(family: str) -> Path | None:
    """The folder with a family's published files; None if VENDOR_CODE has none."""
    name = VOCABULARY_OF_NATIVE if family in NATIVE else family
    folder = Path(os.environ.get("VENDOR_CODE", "/nowhere")).expanduser().absolute() / name
    return folder if (folder / "tokenizer_config.json").is_file() else None


def write_network(family: str, source: Path, folder: Path) -> Path:
    """Writes a network of a family into a new folder, in bfloat16 as published; gives the folder.

    Args:
        family: its name.
        source: from ``published``.
        folder: does not exist.
    """
    if family in NATIVE:
        _native_files(family, source, folder)
    else:
        shutil.copytree(source, folder)
        _shrink(folder)
    config = AutoConfig.from_pretrained(folder)
    maker = AutoModelForImageTextToText if family in NATIVE else AutoModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = maker.from_config(config, dtype=torch.float32)
    left_out = {"lm_head.weight"} if config.tie_word_embeddings else set()
    state = {
        name: (value.detach() * _SPREAD.get(name, 1.0)).bfloat16().contiguous()
        for name, value in model.state_dict().items()
        if name not in left_out
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _shrink(folder: Path) -> None:
    """Makes the published sizes small in the folder's config.json."""
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {**_LANGUAGE, "initializer_range": 0.1, "torch_dtype": "bfloat16"}
    config |= {"max_window_layers": 2} if "max_window_layers" in config else {}
    config["vision_config"] = {**config["vision_config"], **_VISION}
    if "audio_config" in config:
        # The speech output has no weights here.
        config |= {"audio_config": {**config["audio_config"], **_AUDIO}, "init_tts": False}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _native_files(family: str, source: Path, folder: Path) -> None:
    """The files of a 4.6 or 4.7 folder, with published sizes of pictures and the vocabulary of another family."""
    write_tiny_checkpoint(family, folder)
    tokenizer = from_vocabulary(source / "vocab.json", source / "merges.txt", {})
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THINKING])
    special = (*TURN_MARKS, *MEDIA_TOKENS.values())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    tokens = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "newline_id": "Ċ"}
    tokens |= {"image_start_id": "<image>", "image_end_id": "</image>"}
    tokens |= {"slice_start_id": "<slice>", "slice_end_id": "</slice>"}
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {name: ids[token] for name, token in tokens.items() if name in config}
    text = {
        **config["text_config"],
        **_LANGUAGE,
        **_LINEAR,
        "vocab_size": len(ids),
        "eos_token_id": ids["<|endoftext|>"],
    }
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": _MROPE}
    # As published: a next-token layer is counted, which has no weights.
    config["text_config"] = {**text, "dtype": "bfloat16", "mtp_num_hidden_layers": 1}
    config["vision_config"] = {**config["vision_config"], **_VISION}
    config["dtype"] = "bfloat16"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"]}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for part in ("image_processor", "video_processor"):
        settings[part]["scale_resolution"] = 448
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def adapter_parts(family: str) -> list[str]:
    """Modules that an adapter of this family trains in full: the resampler, or the merger."""
    return ["model.merger"] if by_name(family).network is None else ["resampler"]
