"""``python -m finetune demo``: trains a tiny model on a synthetic image task and verifies the adapter.

Runs sh finetune_lora.sh as a user would, then evaluates base and adapter on held-out questions and blanked images.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import finetune
from finetune.commands.parser import CommandParser
from finetune.runtime.imports import optional_libraries_hidden
from finetune.sample import Sample

ROOT = Path(finetune.__file__).resolve().parent.parent
# Hyperparameters with which the tiny model learns within a minute; for real checkpoints use the launcher's defaults.
FLAGS = (
    "--learning_rate 3e-3 --lora_r 16 --lora_alpha 32 --lora_dropout 0 --weight_decay 0 --warmup_steps 0.1 "
    "--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --per_device_eval_batch_size 8 "
    "--gradient_checkpointing false --logging_steps 20"
)


def main(argv: list[str]) -> int:
    """Creates model and data, trains, evaluates; the last line of the output is the result."""
    args = build_parser().parse_args(argv)

    from finetune.tiny.checkpoint_writer import write_tiny_checkpoint
    from finetune.tiny.demo_dataset import write_demo_dataset

    out = args.out.absolute()
    model, data, adapter = out / "model", out / "data", out / "adapter"
    print(f"1/4 tiny random {args.family} checkpoint in {model}", flush=True)
    write_tiny_checkpoint(args.family, model, seed=args.seed, overwrite=True)
    print(f"2/4 image data set with known answers in {data}", flush=True)
    write_demo_dataset(data, seed=args.seed, overwrite=True)
    print("3/4 sh finetune_lora.sh", flush=True)
    status = train(model, data, adapter, args.epochs)
    if status != 0:
        print(f"error: finetune_lora.sh ended with status {status}")
        return status
    print("4/4 held-out questions, before and after", flush=True)
    exact, blanked = report(adapter, data)
    print(f"exact_match={exact:.4f} exact_match_blanked={blanked:.4f} adapter={adapter} verified=true")
    return 0


def train(model: Path, data: Path, adapter: Path, epochs: float) -> int:
    """Runs the LoRA launcher as a user would; its exit status includes the verification of the adapter."""
    environment = dict(os.environ)
    # torchrun is in the folder of the interpreter, also where no environment is active.
    environment["PATH"] = f"{environment.get('PATH', os.defpath)}{os.pathsep}{Path(sys.executable).parent}"
    environment.update(
        MODEL=str(model), DATA=str(data / "train.json"), EVAL_DATA=str(data / "eval.json"), OUTPUT_DIR=str(adapter)
    )
    flags = [*FLAGS.split(), "--num_train_epochs", str(epochs), "--overwrite_output_dir", "true"]
    return subprocess.run(["sh", str(ROOT / "finetune_lora.sh"), *flags], env=environment, check=False).returncode


def report(adapter: Path, data: Path) -> tuple[float, float]:
    """Prints base and adapter side by side; returns the adapter's exact match, with images and blanked."""
    with optional_libraries_hidden():
        from peft import PeftModel

    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.encoding.encoder import Encoder
    from finetune.evaluation.batched_generation import generate_answers, split_answer
    from finetune.models import load_model, load_tokenizer
    from finetune.readers import read

    model = load_model(adapter).eval()
    assert isinstance(model, PeftModel)
    base = resolve_base(model.peft_config["default"].base_model_name_or_path or "")
    tokenizer = load_tokenizer(adapter)

    def answer(file: str, what: str, slices: int | None = None) -> list[str]:
        encoder = Encoder(base.family, tokenizer, base.settings, max_slice_nums=slices)
        prompts = [split_answer(sample)[0] for sample in read(data / file)]
        return generate_answers(model, tokenizer, encoder, prompts, max_new_tokens=8, description=what)

    pairs = [split_answer(sample) for sample in read(data / "eval.json")]
    references = [reference for _, reference in pairs]
    tasks = [record["task"] for record in json.loads((data / "eval.json").read_text(encoding="utf-8"))]
    given = {
        "adapter": answer("eval.json", "adapter"),
        "thumbnail": answer("eval.json", "adapter, thumbnails only", slices=1),
        "blanked": answer("eval_blanked.json", "adapter, grey images"),
    }
    with model.disable_adapter():
        given["base"] = answer("eval.json", "base")

    _print_answers(pairs, tasks, given)
    return match(given["adapter"], references), match(given["blanked"], references)


def _print_answers(pairs: list[tuple[Sample, str]], tasks: list[str], given: dict[str, list[str]]) -> None:
    """The first answers, and the exact match by task."""
    references = [reference for _, reference in pairs]
    for index in range(4):
        print(f"  {pairs[index][0].messages[-1].text.strip()}")
        print(f"    answer {references[index]!r}   base {given['base'][index]!r}   adapter {given['adapter'][index]!r}")
    print(f"  exact match on {len(references)} held-out questions (thumbnail: without slices; blanked: grey images)")
    columns = ("base", "adapter", "thumbnail", "blanked")
    print(f"    {'':<12} {' '.join(f'{name:>9}' for name in columns)}")
    for task in [*dict.fromkeys(tasks), "all"]:
        chosen = [index for index, name in enumerate(tasks) if task in (name, "all")]
        shares = (match([given[name][i] for i in chosen], [references[i] for i in chosen]) for name in columns)
        print(f"    {task:<12} {' '.join(f'{share:>9.3f}' for share in shares)}")


def match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Fraction of answers equal to their reference."""
    return sum(a == b for a, b in zip(answers, references, strict=True)) / len(references)


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(prog="python -m finetune demo", description=__doc__)
    parser.add_argument("--family", default="llama3_v2_5", help="family of the tiny checkpoint")
    parser.add_argument("--out", type=Path, default=Path("output/demo"), help="output folder")
    parser.add_argument("--epochs", type=float, default=3, help="training epochs")
    parser.add_argument("--seed", type=int, default=0)
    return parser
