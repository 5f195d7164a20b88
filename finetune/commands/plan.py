"""``python -m finetune plan``: estimates the GPU memory of a training step by method, ZeRO stage and batch size.

MODEL is a checkpoint folder (config.json is enough), a hub id, or the name of a family (v4_5, ...), whose published
sizes are known. With DATA the longest record is measured, without it --length and --slices set the shape.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.arguments.data import VIDEO_FLAGS, DataArguments
from finetune.commands.parser import CommandParser
from finetune.commands.shared_flags import PLACE_FLAGS, add_flags, add_prompt_flags, data_arguments, positive, truth
from finetune.utils.errors import ArgumentError, UserError

if TYPE_CHECKING:
    from finetune.model_folders.downsample_mode import Mode
    from finetune.planning.training_setup import Method, SampleShape, TrainingSetup

# Default length of a sample in tokens; raised when its images with some text need more.
_LENGTH, _TEXT, _STEP = 2048, 512, 1024


def main(argv: list[str]) -> int:
    """Run ``python -m finetune plan``; 0 when a setting fits, 1 when none does, 2 for a wrong argument."""
    parser = build_parser()
    given = parser.parse_args(argv)
    try:
        if given.model is None:
            parser.error("MODEL is missing: a checkpoint folder, a hub id, or the name of a family")
        return _plan(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _plan(given: argparse.Namespace) -> int:
    import finetune.models  # noqa: F401  hides bitsandbytes from peft, and so comes first
    from finetune.planning import estimate_table, settings_search
    from finetune.planning.memory_estimate import GIB, MemoryEstimator
    from finetune.planning.meta_model import quiet

    config, settings, name, mode = _model(given)
    shape = _shape(given, settings)
    base = _recipe(given, config)
    limit = int((given.gpu_memory or _memory_here() or 24) * GIB)
    methods = _methods(given, config)
    with quiet():
        planner = MemoryEstimator(config)
        print(f"{planner.family.title}, {planner.parameters():,} parameters; {_described(shape)}")
        if mode is not None:
            print(mode)
        rows = settings_search.rows(planner, shape, base, methods)
        wanted = [row for row in rows if _chosen(row[0], given)]
        print(estimate_table.table(wanted, limit), end="\n\n")
        found = [settings_search.gpus_needed(planner, shape, base, method, limit) for method in methods]
    fitting = [(recipe, memory) for recipe, memory in filter(None, found)]
    print(f"the fastest settings that fit {estimate_table.gigabytes(limit)} GB per GPU:" if fitting else "nothing fits")
    data = f"--dataset {given.dataset}" if given.dataset else f"--data_path {given.data or 'DATA'}"
    more = [f"--model_name_or_path {name}", data, f"--model_max_length {shape.tokens}"]
    more += [f"--per_device_train_batch_size {shape.batch}"]
    more += [f"--max_slice_nums {given.slices}"] if given.slices else []
    more += [f"--downsample_mode {mode.name}"] if mode is not None and mode.chosen else []
    more += [] if given.use_image_id is None else [f"--use_image_id {str(given.use_image_id).lower()}"]
    for recipe, memory in fitting:
        print(estimate_table.advice(recipe, memory, more))
    print(f"\n{estimate_table.NOTE}")
    return 0 if any(recipe.gpus == base.gpus for recipe, _ in fitting) else 1


def _model(given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], str, Mode | None]:
    """config.json and settings of a folder, a hub id or a family, its name for the command line, and its mode."""
    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.families import FAMILIES, by_name
    from finetune.model_folders.downsample_mode import decide, with_mode
    from finetune.model_folders.image_ids import decide_image_ids

    model = given.model
    if model in [each.name for each in FAMILIES] and not Path(model).is_dir():
        family = by_name(model)
        known = family.published.settings
        mode = decide(family, known, None, given.downsample_mode)
        decide_image_ids(family, known, None, given.use_image_id)  # refuses a flag without effect
        return with_mode(family.published.config, mode), with_mode(known, mode), family.hub_id, mode
    base = resolve_base(model, given.downsample_mode, use_image_id=given.use_image_id)
    return with_mode(base.config, base.mode), base.settings, model, base.mode


def _shape(given: argparse.Namespace, settings: dict[str, Any]) -> SampleShape:
    from finetune.families import detect
    from finetune.planning.training_setup import SampleShape

    family = detect(settings)
    spec, layout = family.slice_spec(settings), family.layout(settings)
    patches = (spec.scale_resolution // spec.patch_size) ** 2
    slices = spec.max_slice_nums if given.slices is None else given.slices
    items = 0 if not slices else (slices + 1 if slices > 1 else 1) * given.images
    each = spec.scale_resolution**2 // layout.pixels_per_token if layout.pixels_per_token else layout.query_num
    tokens = given.length or max(_LENGTH, -(-(items * each + _TEXT) // _STEP) * _STEP)
    # Training reduces the slices of images that are longer than that.
    items = min(items, max(tokens // each, given.images))
    shape = SampleShape(batch=given.batch, tokens=tokens, items=items, patches=patches, labelled=given.labelled)
    if given.data is None and given.dataset is None:
        from finetune.planning.recompute_choice import of_pairs

        if data_arguments(given) != DataArguments(stage=given.stage):
            raise ArgumentError("flags about data have no effect without DATA or --dataset")
        return of_pairs(shape) if given.stage == "dpo" else shape
    if given.model in _families():
        raise ArgumentError("measuring DATA needs a tokenizer: give the folder of a checkpoint, not a family")
    return _measured(given, shape)


def _families() -> tuple[str, ...]:
    from finetune.families import FAMILIES

    return tuple(family.name for family in FAMILIES)


def _measured(given: argparse.Namespace, shape: SampleShape) -> SampleShape:
    """The shape of the longest record and of the one with the most patches."""
    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.encoding.encoder import Encoder
    from finetune.encoding.length_policy import LengthPolicy
    from finetune.planning.recompute_choice import measured_shape
    from finetune.readers.mixture import open_data
    from finetune.tokenizers.tokenization import load_tokenizer

    base = resolve_base(given.model, given.downsample_mode, use_image_id=given.use_image_id)
    data = data_arguments(given)
    data.max_slice_nums = given.slices or None
    tokenizer = load_tokenizer(base.folder, duplex_prompt=base.duplex_name)
    options: dict[str, Any] = {"max_length": given.length or 2048, "duplex": base.duplex_name, **data.encoding}
    encoder = Encoder(base.family, tokenizer, base.settings, **options)
    samples = open_data(given.data, data.dataset, **data.reading)
    if (found := measured_shape(LengthPolicy(encoder, data.overlong), samples, shape)) is None:
        raise ArgumentError(f"{samples.title}: none of its records can be used; python -m finetune check tells why")
    return found


def _described(shape: SampleShape) -> str:
    return (
        f"per GPU {shape.batch} x {shape.tokens} tokens, {100 * shape.labelled:.0f} % of them labelled, "
        f"{shape.items} visual items of {shape.patches} patches per sample"
    )


def _methods(given: argparse.Namespace, config: dict[str, Any]) -> tuple[Method, ...]:
    """The methods to plan: of a folder in 4 bit LoRA alone, with what it trains in full stored whole."""
    from finetune.families import detect
    from finetune.model_folders.stored_4bit import check_full_parts, stored_in_4bit
    from finetune.planning.meta_model import build_meta_model, quantised
    from finetune.planning.settings_search import ALL_METHODS

    if not stored_in_4bit(config):
        return ALL_METHODS if given.method == "all" else (given.method,)
    if given.method not in ("all", "lora"):
        raise ArgumentError(
            f"--method {given.method}: {given.model} is stored in 4 bit and is trained with --method lora"
        )
    full = [
        part for part, on in (("vision", given.tune_vision), ("resampler", given.tune_resampler is not False)) if on
    ]
    packed = sorted(quantised(build_meta_model(config), config))
    check_full_parts(given.model, packed, detect(config).parts, full)
    return ("lora",)


def _recipe(given: argparse.Namespace, config: dict[str, Any]) -> TrainingSetup:
    from finetune.model_folders.stored_4bit import stored_in_4bit
    from finetune.planning.training_setup import TrainingSetup

    return TrainingSetup(
        gpus=given.gpus,
        accumulation=given.gradient_accumulation_steps,
        vision_batch=given.vision_batch,
        lora_r=given.lora_r,
        tune_vision=given.tune_vision,
        tune_resampler=given.tune_resampler,
        in_4bit=stored_in_4bit(config),
    )


def _chosen(recipe: TrainingSetup, given: argparse.Namespace) -> bool:
    """Whether a row passes the filters of the command line."""
    return (
        given.zero in (None, recipe.stage)
        and given.offload in (None, recipe.offload)
        and given.gradient_checkpointing in (None, recipe.checkpointing)
    )


def _memory_here() -> float | None:
    """Memory of the first local GPU in GB; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be above 0 and at most 1")
    return value


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        prog="python -m finetune plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint folder, hub id, or name of a family")
    parser.add_argument("data", nargs="?", metavar="DATA", help="data file whose longest record is measured")
    parser.add_argument("--method", choices=["all", "full", "full-llm", "lora", "qlora"], default="all")
    parser.add_argument("--gpus", type=positive, default=1, help="number of GPUs (default: 1)")
    parser.add_argument(
        "--gpu_memory", type=float, metavar="GB", help="memory of one GPU (default: that of the local GPU, or 24)"
    )
    parser.add_argument(
        "--length", type=positive, help="sample length in tokens (default: 2048, more where its images need more)"
    )
    parser.add_argument(
        "--slices", type=int, help="maximum number of slices per image, 0 for text only (default: the checkpoint's)"
    )
    parser.add_argument("--images", type=positive, default=1, help="images per sample (default: 1)")
    parser.add_argument("--batch", type=positive, default=1, help="samples per GPU and micro-batch (default: 1)")
    parser.add_argument(
        "--labelled", type=_fraction, default=0.25, help="fraction of tokens that are trained on (default: 0.25)"
    )
    parser.add_argument("--gradient_accumulation_steps", type=positive, default=1)
    parser.add_argument(
        "--vision_batch",
        type=positive,
        help="maximum number of visual items per forward pass of the vision tower (default: all)",
    )
    parser.add_argument("--lora_r", type=positive, default=64)
    parser.add_argument("--tune_vision", type=truth, metavar="true|false")
    parser.add_argument("--tune_resampler", type=truth, metavar="true|false")
    add_prompt_flags(parser)
    data = parser.add_argument_group("how DATA or --dataset is read, as in training")
    add_flags(data, DataArguments, ["stage", "dataset", *PLACE_FLAGS, *VIDEO_FLAGS])
    add_flags(data, DataArguments, ["max_samples", "train_on", "thinking", "image_max_pixels", "overlong"])
    chosen = parser.add_argument_group("show only the rows with")
    chosen.add_argument("--zero", type=int, choices=[0, 2, 3], help="this stage of ZeRO")
    chosen.add_argument("--offload", type=truth, metavar="true|false")
    chosen.add_argument("--gradient_checkpointing", type=truth, metavar="true|false")
    return parser
