"""``python -m finetune verify FOLDER``: loads a saved result and compares its logits with the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.commands.parser import CommandParser
from finetune.utils.number_format import significant


def main(argv: list[str]) -> int:
    """Loads an adapter or a full model in this process; returns 0 when it loads and its logits agree."""
    parser = CommandParser(prog="python -m finetune verify", description=__doc__)
    parser.add_argument("folder", type=Path, help="adapter or full model folder")
    parser.add_argument("--reference", type=Path, help="logits taken at the end of training (safetensors)")
    parser.add_argument("--device", default="auto", help="auto (GPU when the weights fit, else CPU), cpu, cuda, ...")
    args = parser.parse_args(argv)

    from peft import AutoPeftModel
    from transformers import AutoTokenizer

    from finetune.checkpoints.base_checkpoint import resolve
    from finetune.checkpoints.verification import Origin, compare, origin_of
    from finetune.model_folders.checkpoint_folder import check_side_files, has_adapter, local_folder
    from finetune.models import base_of, load_model
    from finetune.models.adapters import check_adapter, peft_errors
    from finetune.models.strict_loading import some
    from finetune.models.tokenization import tokenizer_errors
    from finetune.training.lora import quantisation

    adapter = has_adapter(folder := local_folder(str(args.folder)))
    if adapter:
        check_adapter(folder)
        check_side_files(folder)
    origin = origin_of(args.reference) if args.reference else Origin("auto")
    options: dict[str, Any] = {"quantization_config": quantisation(origin.dtype)} if origin.quantised else {}
    device = _device(args.folder, adapter) if args.device == "auto" else args.device
    # The downsample_mode it was saved with, not that of the environment: the reference has that many placeholders.
    base = resolve(str(base_of(args.folder) if adapter else args.folder), trained=args.folder, environment={})
    loader = AutoPeftModel.from_pretrained if adapter else load_model
    with peft_errors(folder):
        model = loader(str(args.folder), dtype=origin.dtype, device_map={"": device}, **options).eval()
    with tokenizer_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(str(args.folder))
    loaded = f"loaded {args.folder} on {device}: {type(model).__name__}, {type(tokenizer).__name__}"
    if base.mode is not None:
        model.config.downsample_mode = base.mode.name  # peft loads the base as it is
        loaded += f", {base.mode}"
    if args.reference is None:
        print(loaded)
        return 0
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
    return 0 if result.ok else 3


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
