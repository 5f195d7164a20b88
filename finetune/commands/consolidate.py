"""``python -m finetune consolidate CHECKPOINT OUT``: ZeRO checkpoint shards to a model or adapter.

For a run that ended before its weights were gathered, or with stage3_gather_16bit_weights_on_model_save off. The shards
are pickles: one that imports anything other than what DeepSpeed and torch write is refused before it is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import finetune
from finetune.commands.parser import CommandParser
from finetune.utils.errors import UserError
from finetune.utils.paths import expand

if TYPE_CHECKING:
    from finetune.checkpoints.base_checkpoint import BaseCheckpoint

_DTYPES = ("auto", "float16", "bfloat16", "float32")


def main(argv: list[str]) -> int:
    """Consolidates; returns 0 when the result is complete and loads."""
    given = build_parser().parse_args(argv)
    checkpoint, out = expand(given.checkpoint), expand(given.out).absolute()
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such folder; give the checkpoint-N folder of a run, from this machine")

    import finetune.models  # noqa: F401  hides bitsandbytes from peft, and so comes first
    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.export.result_folder import check_target, unfinished, write_record
    from finetune.export.zero_consolidation import base_named_by, read_shards, write_adapter
    from finetune.model_folders.checkpoint_folder import has_adapter
    from finetune.models import load_model

    checkpoint = checkpoint.resolve()
    name = given.model_name_or_path or base_named_by(checkpoint)
    if name is None:
        raise UserError(f"{checkpoint} does not name its base: give --model_name_or_path")
    # The downsample_mode of the run, not that of the current environment.
    base = resolve_base(name, trained=checkpoint, environment={})
    lora = has_adapter(checkpoint)
    sources = [base.folder, checkpoint]
    check_target(out, sources, overwrite=given.overwrite_output_dir == "true")
    print(f"reading    {checkpoint}; base {base.name}, {base.family.title}")
    state = read_shards(checkpoint, trained_only=lora)
    with unfinished(out, sources, overwrite=given.overwrite_output_dir == "true") as folder:
        count = write_adapter(folder, checkpoint, base, state) if lora else _write_full(given, folder, base, state)
        del state
        write_record(folder, [], _record(base, checkpoint))
        if given.verify == "auto":
            load_model(folder, base=base.folder if lora else None, downsample_mode=base.downsample_mode)
    print(f"consolidated={out} tensors={count}{' loads=true' if given.verify == 'auto' else ''}")
    return 0


def _write_full(given: argparse.Namespace, folder: Path, base: BaseCheckpoint, state: Mapping[str, Any]) -> int:
    """Writes the model of a full training; returns the number of tensors."""
    import torch

    from finetune.export.result_folder import model_card, write_model
    from finetune.export.sharded_writer import WeightFiles
    from finetune.export.zero_consolidation import ConsolidatedTensors

    dtype = None if given.infer_dtype == "auto" else getattr(torch, given.infer_dtype)
    files = WeightFiles(ConsolidatedTensors(base, state), dtype=dtype, shard_size=round(given.export_size * 1e9))
    write_model(folder, base, files, dtype=dtype, card=model_card(base, []))
    return len(state)


def _record(base: BaseCheckpoint, checkpoint: Path) -> dict[str, Any]:
    return {
        "base": {"name": base.name, "revision": base.revision, "family": base.family.name},
        "parts": str(checkpoint),
        "finetune": finetune.__version__,
    }


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        prog="python -m finetune consolidate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint-N folder of a run with ZeRO-2 or ZeRO-3")
    parser.add_argument("out", type=Path, help="folder of the result: an adapter of a LoRA run, else a model")
    parser.add_argument("--model_name_or_path", help="base of the run (default: what its run.yaml or adapter names)")
    parser.add_argument("--export_size", type=float, default=5, help="maximum GB per weight file (default: 5)")
    parser.add_argument(
        "--infer_dtype", choices=_DTYPES, default="auto", help="dtype of a full model (default: the base's)"
    )
    parser.add_argument("--verify", choices=["auto", "off"], default="auto", help="load the result and compare tensors")
    parser.add_argument(
        "--overwrite_output_dir",
        choices=["true", "false"],
        nargs="?",
        const="true",
        default="false",
        help="replace the model that OUT holds",
    )
    return parser
