"""One rank of a streamed run on CPU: which records each of its steps took, and what its loader is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch

from dataset import make_supervised_data_module
from finetune.arguments import parse_arguments
from finetune.encoding.encoder import Encoder
from finetune.models import load_model, load_tokenizer
from finetune.tuning.checkpoint import resolve
from finetune.tuning.parts import adapt
from trainer import CPMTrainer


class Recorder(CPMTrainer):
    """Writes down the sources of every micro-batch."""

    seen: list[list[str]]

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(list(inputs["sources"]))
        return super().training_step(model, inputs, *args, **kwargs)


def run(base: Path, data: Path, output: Path, *flags: str, resume: Path | None = None) -> Recorder:
    """A streamed run of the language model; its checkpoints are complete but for their manifest."""
    paths = ["--model_name_or_path", str(base), "--data_path", str(data), "--output_dir", str(output)]
    quiet = ["--report_to", "none", "--disable_tqdm", "true", "--streaming", "true", "--tune_vision", "false"]
    args = parse_arguments([*paths, *quiet, *flags])
    checkpoint = resolve(str(base))
    torch.manual_seed(0)
    model = adapt(load_model(base, dtype=torch.float32), checkpoint.family, args.training, args.lora)
    tokenizer = load_tokenizer(base)
    encoder = Encoder.from_config(checkpoint.family, tokenizer, checkpoint.config, max_length=2048)
    made = Recorder(
        model=model,
        args=args.training,
        base=checkpoint,
        part_learning_rates=args.training.part_learning_rates,
        **make_supervised_data_module(args.data, encoder, None, 5),
    )
    made.seen = []
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return made


if __name__ == "__main__":
    base, data, output, *flags = sys.argv[1:]
    made = run(Path(base), Path(data), Path(output), *flags)
    report = {"seen": made.seen, "steps": made.state.global_step, "world": made.args.world_size}
    Path(output, f"rank{made.args.process_index}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()
