"""Adapters of LLaMA-Factory, ms-swift and peft on the published code load here with equal logits, and ours there.

``make test-peers`` installs the tools into environments of their own and names them; each trains two real steps on a
tiny network. The published code files come from a folder that VENDOR_CODE names, with a folder per family (v2_6, v4_5,
o4_5: code and config.json); without it the cases that need them are skipped and named.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.saving import finish_adapter
from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.families import by_name
from finetune.models import load_model, load_tokenizer
from finetune.readers.mixture import open_data

SIDE = Path(__file__).with_name("peer_side.py")
ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = {"What colour is it?": "It is red.", "Is it square?": "Yes."}
# Kernels and rounding differ between versions of torch and transformers; the largest logit is above 3.
TOLERANCE = 2e-4


def python_of(name: str) -> Path:
    """The interpreter of an environment that ``make test-peers`` has made."""
    found = ROOT / f".venv-{name}" / "bin" / "python"
    if not found.is_file():
        pytest.skip(f"{found.parent.parent.name} is missing: make test-peers")
    return found


def with_vendor_code(folder: Path, family: str) -> Path:
    """Puts the published code files beside the weights of a tiny checkpoint."""
    source = Path(os.environ.get("VENDOR_CODE", "")) / family
    if not os.environ.get("VENDOR_CODE") or not list(source.glob("modeling_minicpm?.py")):
        pytest.skip(f"left out: VENDOR_CODE names no folder with {family}")
    for path in source.glob("*.py"):
        code = path.read_text(encoding="utf-8")
        if path.name == "resampler.py" and re.search(r"\bList\b", code) and not re.search(r"import .*\bList\b", code):
            code = f"from typing import List\n{code}"  # a star import of torch below 2.13 had it
        (folder / path.name).write_text(code, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = json.loads((source / "config.json").read_text())["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def base_of(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny checkpoint, with code files where asked for."""

    def make(family: str, *, published: bool) -> Path:
        folder = shutil.copytree(tiny(family), tmp_path / family)
        return with_vendor_code(folder, family) if published else folder

    return make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Records that all three tools read: messages and images."""
    image = Image.new("RGB", (120, 90), "red")
    image.save(tmp_path / "red.png")
    records = [
        {
            "messages": [
                {"role": "user", "content": f"<image>\n{question}"},
                {"role": "assistant", "content": answer},
            ],
            "images": [str(tmp_path / "red.png")],
        }
        for question, answer in QUESTIONS.items()
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "data.json", "formatting": "sharegpt", "tags": tags}
    entry["columns"] = {"messages": "messages", "images": "images"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"data": entry}))
    return tmp_path / "data.json"


def run(python: Path, *words: str, folder: Path) -> None:
    """Runs a program of another environment without a network; its output shows in a failure."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [str(python), *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def llamafactory(base: Path, data: Path, folder: Path) -> Path:
    """Two steps of LLaMA-Factory; gradient checkpointing off, which the published code does not survive there."""
    settings = {
        "model_name_or_path": str(base),
        "trust_remote_code": True,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "q_proj,v_proj",
        "lora_rank": 4,
        "dataset": "data",
        "dataset_dir": str(data.parent),
        "template": "minicpm_v",
        "cutoff_len": 1024,
        "output_dir": str(folder / "peer"),
        "per_device_train_batch_size": 1,
        "max_steps": 2,
        "learning_rate": 0.05,
        "report_to": "none",
        "disable_gradient_checkpointing": True,
        "preprocessing_num_workers": 1,
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    run(python_of("llamafactory"), "-m", "llamafactory.cli", "train", "train.yaml", folder=folder)
    return folder / "peer"


def swift(base: Path, data: Path, folder: Path) -> Path:
    """Two steps of ms-swift."""
    flags: dict[str, Any] = {
        "model": base,
        "model_type": "minicpmv4_6",
        "dataset": data.with_suffix(".jsonl"),
        "tuner_type": "lora",
        "lora_rank": 4,
        "target_modules": "all-linear",
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "learning_rate": 0.05,
        "torch_dtype": "float32",
        "split_dataset_ratio": 0,
        "report_to": "none",
        "use_hf": "true",
        "output_dir": folder / "peer",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run(python_of("swift"), "-m", "swift.cli.sft", *words, folder=folder)
    (found,) = (folder / "peer").glob("*/checkpoint-2")
    return found


def ours(base: Path, family: str, folder: Path) -> Path:
    """An adapter as this toolkit saves it: LoRA on the language model, the resampler in full, all values moved."""
    torch.manual_seed(0)
    values = by_name(family)
    saved = list(values.parts["resampler"])
    config = LoraConfig(r=4, target_modules=values.lora_targets["llm"], modules_to_save=saved)
    model: Any = get_peft_model(load_model(base, dtype="float32"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    finish_adapter(model, folder, resolve_base(str(base)))
    return folder


def batches(base: Path, data: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A question with its image as our model takes it, and as the other side does."""
    checkpoint = resolve_base(str(base))
    encoder = Encoder(checkpoint.family, load_tokenizer(base), checkpoint.settings)
    (sample, *_) = open_data(data, None)
    example = encoder.encode(sample)
    batch = {name: value for name, value in pad([example], encoder.pad_id).items() if name not in ("labels",)}
    if "patches" not in batch:  # a class of transformers, which takes what our own does
        return batch, {name: value.contiguous() for name, value in batch.items()}
    theirs = {"input_ids": batch["input_ids"], "tgt_sizes": batch["tgt_sizes"].to(torch.int32)}
    theirs["image_bound"] = batch["image_bound"][:, 1:].contiguous()
    start = 0
    for index, (height, width) in enumerate(batch["tgt_sizes"].tolist()):
        rows = batch["patches"][start : start + height * width]
        start += height * width
        pixels = (rows.float() / 255 - 0.5) / 0.5
        theirs[f"image.{index}"] = pixels.reshape(-1, 3, 14, 14).permute(1, 2, 0, 3).reshape(3, 14, -1).contiguous()
    return batch, theirs


def compare(python: Path, base: Path, adapter: Path, data: Path, folder: Path) -> None:
    """Compares logits of the adapter here and there; it must change those of the base."""
    mine, theirs = batches(base, data)
    save_file(theirs, folder / "batch.safetensors")
    words = [str(SIDE), str(base), str(adapter), str(folder / "batch.safetensors"), str(folder / "logits.safetensors")]
    run(python, *words, folder=folder)
    model: Any = load_model(adapter, base=base, dtype="float32").eval()
    with torch.no_grad():
        logits = model(**mine).logits
        with model.disable_adapter():
            plain = model(**mine).logits
    found = load_file(folder / "logits.safetensors")["logits"]
    largest = logits.abs().max()
    assert (logits - plain).abs().max() > 100 * TOLERANCE * largest, "the adapter changes too little to tell"
    torch.testing.assert_close(found, logits, rtol=0, atol=TOLERANCE * float(largest))


def test_llamafactory(base_of, data, tmp_path) -> None:
    base, python = base_of("v4_5", published=True), python_of("llamafactory")
    compare(python, base, llamafactory(base, data, tmp_path), data, tmp_path)
    compare(python, base, ours(base, "v4_5", tmp_path / "ours"), data, tmp_path)


def test_swift(base_of, data, tmp_path) -> None:
    base, python = base_of("v4_6", published=False), python_of("swift")
    compare(python, base, swift(base, data, tmp_path), data, tmp_path)
    compare(python, base, ours(base, "v4_6", tmp_path / "ours"), data, tmp_path)


@pytest.mark.parametrize("family", ["v2_6", "v4_5", "o4_5"])
def test_published_code(base_of, data, tmp_path, family) -> None:
    """transformers 4.51, which the card of o 4.5 names; the code of o 2.6 imports what only 4.44 had."""
    base, python = base_of(family, published=True), python_of("published")
    compare(python, base, ours(base, family, tmp_path / "ours"), data, tmp_path)
