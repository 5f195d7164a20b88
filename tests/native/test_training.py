"""4.6, 4.7 and OCR through the trainer: full and LoRA, saved, loaded again by everybody's classes, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversations import CONVERSATIONS, encoder, sample
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file

from dataset import make_supervised_data_module
from finetune.arguments.parse import parse_arguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.verification import compare, take_reference
from finetune.encoding.collate import pad
from finetune.families import by_name
from finetune.models import load_model
from finetune.training.freezing import adapt, part_of
from trainer import CPMTrainer

LORA = ("--use_lora", "true", "--lora_r", "4", "--lora_parts", "llm", "vision", "resampler", "--tune_vision", "false")
FLAGS = {
    "full": ("--tune_vision", "true", "--learning_rate", "1e-3"),
    "lora": (*LORA, "--tune_resampler", "false", "--learning_rate", "1e-2"),
    "lora_resampler": ("--use_lora", "true", "--tune_vision", "false", "--tune_resampler", "true"),
}


def trained(folder: Path, data: Path, output: Path, *flags: str) -> CPMTrainer:
    given = ["--model_name_or_path", str(folder), "--data_path", str(data / "train.json"), "--output_dir", str(output)]
    given += ["--eval_data_path", str(data / "eval.json"), "--max_steps", "3", "--per_device_train_batch_size", "2"]
    given += ["--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--dataloader_num_workers", "0"]
    args = parse_arguments([*given, "--use_cpu", "true", *flags])
    base = resolve_base(str(folder))
    model = adapt(load_model(folder, dtype=torch.float32), base.family, args.training, args.lora)
    made = CPMTrainer(
        model=model,
        args=args.training,
        base=base,
        part_learning_rates=args.training.part_learning_rates,
        **make_supervised_data_module(args.data, encoder(folder)),
    )
    made.train()
    made.save_model()
    return made


def network(made: CPMTrainer) -> Any:
    return made.accelerator.unwrap_model(made.model)


def batch_of(folder: Path) -> dict[str, torch.Tensor]:
    made = encoder(folder)
    batch = pad([made.encode(sample(CONVERSATIONS[name])) for name in ("sliced", "text", "several")], made.pad_id)
    del batch["labels"]
    return batch


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits[batch["attention_mask"].bool()]


def test_a_full_result_is_the_trained_network(native, demo_data: Path, family: str, tmp_path: Path) -> None:
    folder = native(family)
    made = trained(folder, demo_data, tmp_path, *FLAGS["full"])
    reference = take_reference(made, encoder(folder).encode(sample(CONVERSATIONS["sliced"])), 0, "float32", False)
    assert reference is not None
    batch, wanted = batch_of(folder), logits(network(made), batch_of(folder))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    base = json.loads((folder / "config.json").read_text())
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {**saved, "torch_dtype": None} == {**base, "torch_dtype": None}
    stock = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(stock).__module__.startswith("transformers.")
    state = stock.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network(made).state_dict().items())
    assert torch.equal(logits(stock, batch), wanted)
    again = load_model(tmp_path)
    assert torch.equal(logits(again, batch), wanted)
    assert compare(again, reference).ok
    before = load_file(folder / "model.safetensors")
    moved = {part_of(name, made.base.family.parts) for name, old in before.items() if not torch.equal(old, state[name])}
    assert moved == {"vision", "resampler", "llm"}


@pytest.mark.parametrize("kind", ["lora", "lora_resampler"])
def test_an_adapter_is_the_trained_network(native, demo_data: Path, family: str, tmp_path: Path, kind: str) -> None:
    folder = native(family)
    made = trained(folder, demo_data, tmp_path, *FLAGS[kind])
    batch, wanted = batch_of(folder), logits(network(made), batch_of(folder))
    assert not torch.allclose(wanted, logits(load_model(folder), batch), atol=1e-3)
    again, anywhere = load_model(tmp_path), AutoPeftModel.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), wanted)
    assert isinstance(anywhere, PeftModel)
    assert type(anywhere.base_model.model).__module__.startswith("transformers.")
    assert torch.equal(logits(anywhere, batch), wanted)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    name = type(network(made).get_base_model()).__name__
    kind = by_name(family).published.config["model_type"]
    module = f"transformers.models.{kind}.modeling_{kind}"
    mode = "4x" if family == "ocr1_0" else "16x"
    assert written["auto_mapping"] == {"base_model_class": name, "parent_library": module, "downsample_mode": mode}
    assert isinstance(again, PeftModel)
    merged = again.merge_and_unload()  # pyright: ignore[reportCallIssue]
    assert type(merged).__name__ == name
    torch.testing.assert_close(logits(merged, batch), wanted, rtol=1e-3, atol=1e-3)


def test_adapters_wrap_both_kinds_of_attention(native, demo_data: Path, family: str, tmp_path: Path) -> None:
    made = trained(native(family), demo_data, tmp_path, *FLAGS["lora"])
    names = {name for name, weight in network(made).named_parameters() if weight.requires_grad}
    for inside in ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj", "self_attn.q_proj"):
        assert any(f"language_model.layers.{layer}.{inside}.lora_B" in name for name in names for layer in (0, 1)), (
            inside
        )
    assert any("vision_tower.encoder.layers.1.self_attn.out_proj" in name for name in names)
    assert any("vit_merger.self_attn.q_proj" in name for name in names)
    assert any("merger.mlp.0.linear_2" in name for name in names)
    state = load_file(tmp_path / "adapter_model.safetensors")
    learnt = {name: bool(tensor.any()) for name, tensor in state.items() if "lora_B" in name}
    # In 4x, the mode of OCR, nothing goes through the tower's own merger.
    unused = {name for name in learnt if "vit_merger" in name and family == "ocr1_0"}
    assert {name for name, moved in learnt.items() if not moved} == unused


def test_loss_falls_and_evaluation_counts_tokens(native, demo_data: Path, family: str, tmp_path: Path) -> None:
    flags = ("--max_steps", "12", "--logging_steps", "1", "--learning_rate", "3e-3", "--tune_vision", "true")
    made = trained(native(family), demo_data, tmp_path, *flags)
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    metrics = made.evaluate()
    assert metrics["eval_tokens"] > 0
    assert metrics["eval_loss"] < losses[0]
