"""``python -m finetune verify FOLDER``: loads a saved result, compares it with the trained model, gives a verdict."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from finetune.commands.parser import CommandParser
from finetune.runtime.imports import optional_libraries_hidden
from finetune.runtime.out_of_memory import explaining
from finetune.runtime.outcome import NOT_VERIFIED, OK, UNUSABLE_RESULT
from finetune.utils.number_format import significant
from finetune.utils.terminal import red


def main(argv: list[str]) -> int:
    """Loads a result in this process; returns 0 when its logits agree, 3 when not, 4 for an idle adapter."""
    args = build_parser().parse_args(argv)
    with explaining(lambda: ["--device cpu"], f"{args.folder} is as it was"):
        return _verify(args)


def _verify(args: argparse.Namespace) -> int:
    """Loads the result and compares it, or looks for an effect; returns the exit status."""
    with optional_libraries_hidden():
        from peft import AutoPeftModel
    from transformers import AutoTokenizer

    from finetune.checkpoints.adapter_effect import no_effect
    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.checkpoints.verification import Origin, origin_of
    from finetune.model_folders.checkpoint_folder import check_side_files, has_adapter, resolve_folder
    from finetune.models import base_of, load_model
    from finetune.models.adapters import check_adapter, peft_errors
    from finetune.models.packed_4bit import prepare_4bit
    from finetune.tokenizers.tokenization import tokenizer_errors
    from finetune.training.lora import quantisation

    adapter = has_adapter(folder := resolve_folder(str(args.folder)))
    if adapter:
        check_adapter(folder)
        check_side_files(folder)
    origin = origin_of(args.reference) if args.reference else Origin("auto")
    options: dict[str, Any] = {"quantization_config": quantisation(origin.dtype)} if origin.quantised else {}
    device = _device(args.folder, adapter) if args.device == "auto" else args.device
    # The downsample_mode it was saved with, not that of the environment: the reference has that many placeholders.
    base = resolve_base(str(base_of(args.folder) if adapter else args.folder), trained=args.folder, environment={})
    loader = AutoPeftModel.from_pretrained if adapter else load_model
    with peft_errors(folder), optional_libraries_hidden(unless=origin.quantised or base.in_4bit):
        model = loader(str(args.folder), dtype=origin.dtype, device_map={"": device}, **options).eval()
    with tokenizer_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(str(args.folder))
    loaded = f"loaded {args.folder} on {device}: {type(model).__name__}, {type(tokenizer).__name__}"
    if base.in_4bit:
        prepare_4bit(model, origin.dtype)  # as our classes do; those of transformers are loaded here
    if base.mode is not None:
        model.config.downsample_mode = base.mode.name  # peft loads the base as it is
        loaded += f", {base.mode}"
    if args.reference is None:
        print(loaded)
        return _verdict(args.folder, "", no_effect(model, None), adapter=adapter)
    return _compare(args, model, loaded, adapter=adapter)


def _compare(args: argparse.Namespace, model: Any, loaded: str, *, adapter: bool) -> int:
    """Compares with the reference and prints figures and verdict; returns the exit status."""
    from finetune.checkpoints.verification import compare
    from finetune.models.strict_loading import some

    result = compare(model, args.reference)
    figures = {"logit_difference": result.difference, "relative": result.relative, "tolerance": result.tolerance}
    if result.base_difference is not None:
        figures["base_difference"] = result.base_difference
    shown = " ".join(f"{name}={significant(value)}" for name, value in figures.items())
    print(f"verified={str(result.ok).lower()} {shown} ({loaded}; {result.reasons()})")
    if not result.ok:
        wrong = f"; {len(result.wrong)} trained tensors have other values: {some(result.wrong)}" if result.wrong else ""
        print(
            f"error: {args.folder} does not match the trained model{wrong}. The files were kept; "
            "training itself is not affected, but do not use this folder before the difference is understood"
        )
        return NOT_VERIFIED
    return _verdict(args.folder, " and gives the logits of the trained model", result.no_effect, adapter=adapter)


def _verdict(folder: Path, compared: str, no_effect: str | None, *, adapter: bool) -> int:
    """Prints the last line, in words; returns the exit status.

    Args:
        folder: of the result.
        compared: what was found beyond that it loads, as the end of a sentence.
        no_effect: why the adapter changes nothing.
        adapter: whether the result is an adapter.
    """
    if no_effect is not None:
        message = (
            f"error: {folder} loads{compared}, but the adapter changes nothing: {no_effect}. Train longer, or with a "
            "higher --learning_rate"
        )
        print(red(message, sys.stdout))
        return UNUSABLE_RESULT
    effect = "; the adapter changes the base" if adapter else ""
    missing = "" if compared else "; it was not compared with its training, which --reference does"
    print(f"verdict: {folder} loads{compared}{effect}{missing}")
    return OK


def _device(folder: Path, adapter: bool) -> str:
    """The GPU when its free memory holds the weights with some margin, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    folders = [folder]
    if adapter:
        from finetune.models import base_of

        base = base_of(folder)
        folders.append(base)
    weights = sum(path.stat().st_size for place in folders for path in place.glob("*.safetensors"))
    free, _ = torch.cuda.mem_get_info()
    return "cuda" if free > 1.3 * weights + 2**31 else "cpu"


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(prog="python -m finetune verify", description=__doc__)
    parser.add_argument("folder", type=Path, help="adapter or full model folder")
    parser.add_argument("--reference", type=Path, help="logits taken at the end of training (safetensors)")
    parser.add_argument("--device", default="auto", help="auto (GPU when the weights fit, else CPU), cpu, cuda, ...")
    return parser
