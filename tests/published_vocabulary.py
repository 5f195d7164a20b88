"""A tiny o 4.5 with the ids of the published vocabulary, which the full-duplex prompt o45_fc needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

import finetune.models  # noqa: F401  registers the model class
from finetune.templates.duplex_fc import FIRST_ID, PUBLISHED_IDS
from finetune.tokenizers.tokenization import load_tokenizer

BASE_SIZE = 151_643
SIZES = {"num_hidden_layers": 1, "vocab_size": FIRST_ID}


def write_published_size(tiny: Path, out: Path, *, seed: int = 0) -> Path:
    """Writes the folder: the files of a tiny o 4.5, another tokenizer, and weights of other sizes."""
    left_out = shutil.ignore_patterns("vocab.json", "merges.txt", "added_tokens.json", "*.safetensors")
    shutil.copytree(tiny, out, ignore=left_out)
    ids = _write_tokenizer(tiny, out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    decoder = {entry["content"]: entry for entry in settings["added_tokens_decoder"].values()}
    settings["added_tokens_decoder"] = {str(ids[token]): entry for token, entry in decoder.items()}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **SIZES}))
    torch.manual_seed(seed)
    model = AutoModel.from_config(AutoConfig.from_pretrained(out), dtype=torch.float32)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    state["tts.projector.weight"] = torch.arange(64, dtype=torch.bfloat16).reshape(8, 8)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _write_tokenizer(tiny: Path, out: Path) -> dict[str, int]:
    """tokenizer.json with words that no text has up to the published size, and the ids of all added tokens."""
    tokenizer: Any = load_tokenizer(tiny)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"]: token for token in spec["added_tokens"]}
    vocab = {token: number for token, number in spec["model"]["vocab"].items() if token != "<unk>"}
    free = (number for number in range(BASE_SIZE) if number not in {*vocab.values(), PUBLISHED_IDS["<unk>"]})
    vocab |= {"<unk>": PUBLISHED_IDS["<unk>"], **{f"[filler {number}]": number for number in free}}
    spec["model"]["vocab"] = vocab
    ids = {token: number for token, number in PUBLISHED_IDS.items() if number >= BASE_SIZE}
    others = [token for token in added if token not in {*ids, "<unk>"}]
    room = [number for number in range(BASE_SIZE, FIRST_ID) if number not in ids.values()]
    others += [f"<|reserved {number}|>" for number in range(len(room) - len(others))]
    ids |= dict(zip(others, room, strict=True))
    some = added["<|im_end|>"]
    made = [{**added.get(token, some), "content": token, "id": number} for token, number in ids.items()]
    made.append({**added["<unk>"], "id": vocab["<unk>"]})
    spec["added_tokens"] = sorted(made, key=lambda token: token["id"])
    (out / "tokenizer.json").write_text(json.dumps(spec))
    return ids | {"<unk>": vocab["<unk>"]}
