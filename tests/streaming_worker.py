"""Streamed runs on CPU, one rank of several or alone: which records each micro-batch took."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch

import trainer
from dataset import make_supervised_data_module
from finetune.arguments.parse import parse_arguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import Encoder
from finetune.models import load_model, load_tokenizer
from finetune.runtime.outcome import exit_after_handlers
from finetune.training.freezing import adapt
from trainer import CPMTrainer

ROOT = Path(__file__).resolve().parent.parent


class Recorder(CPMTrainer):
    """Writes down the sources of every micro-batch."""

    seen: ClassVar[list[list[str]]] = []

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(list(inputs["sources"]))
        return super().training_step(model, inputs, *args, **kwargs)


def run(base: Path, data: Path, output: Path, *flags: str, resume: Path | None = None) -> Recorder:
    """A streamed run of the language model; its checkpoints are complete but for their manifest."""
    paths = ["--model_name_or_path", str(base), "--data_path", str(data), "--output_dir", str(output)]
    quiet = ["--report_to", "none", "--disable_tqdm", "true", "--streaming", "true", "--tune_vision", "false"]
    args = parse_arguments([*paths, *quiet, *flags])
    checkpoint = resolve_base(str(base))
    torch.manual_seed(0)
    model = adapt(load_model(base, dtype=torch.float32), checkpoint.family, args.training, args.lora)
    tokenizer = load_tokenizer(base)
    encoder = Encoder(checkpoint.family, tokenizer, checkpoint.config, max_length=2048)
    made = Recorder(
        model=model,
        args=args.training,
        base=checkpoint,
        part_learning_rates=args.training.part_learning_rates,
        **make_supervised_data_module(args.data, encoder, None, 5),
    )
    Recorder.seen = []
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return made


def main(reports: Path, words: list[str]) -> int:
    """The script itself, whose trainer writes down what it saw."""
    trainer.CPMTrainer = Recorder
    spec = importlib.util.spec_from_file_location("launched", ROOT / "finetune.py")
    assert spec is not None
    assert spec.loader is not None
    launched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launched)
    status = launched.main(words, launched.prepare())
    (reports / f"rank{os.environ['RANK']}.json").write_text(
        json.dumps({"seen": Recorder.seen, "world": int(os.environ["WORLD_SIZE"])})
    )
    return status


if __name__ == "__main__":
    exit_after_handlers(main(Path(sys.argv[1]), sys.argv[2:]))
