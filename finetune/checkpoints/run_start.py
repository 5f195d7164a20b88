"""Start of a run: base checkpoint, output folder, process group, and the checkpoint to resume from.

Finds the base and checks the flags against it, locks the output folder, starts the process group, and chooses.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from finetune.arguments.legacy import LLM_TYPES
from finetune.arguments.parse import Arguments
from finetune.arguments.requirements import check_quantised_stage
from finetune.checkpoints.base_checkpoint import BaseCheckpoint, resolve_base, side_files
from finetune.checkpoints.manifest import zero_stage
from finetune.checkpoints.output_folder import Input, OutputFolder
from finetune.checkpoints.resume import choose_checkpoint
from finetune.checkpoints.run_identity import RunIdentity, identify
from finetune.checkpoints.universal_checkpoint import convert_for_world_size, set_load_universal
from finetune.families.family import Family
from finetune.model_folders.checkpoint_folder import weight_files
from finetune.model_folders.stored_4bit import check_adapters_only, check_full_parts, packed_weights
from finetune.runtime import distributed
from finetune.training.freezing import full_parts
from finetune.utils.errors import ArgumentError
from finetune.utils.paths import expand

logger = logging.getLogger(__name__)


def find_base(args: Arguments) -> BaseCheckpoint:
    """The base checkpoint; its downsample_mode and image ids may come from the adapter of --lora_weight_path."""
    adapter = args.lora.lora_weight_path if args.training.use_lora else None
    trained = None if adapter is None else Path(adapter)
    model = args.model
    wished = {"use_image_id": model.use_image_id, "duplex_prompt": model.duplex_prompt}
    base = resolve_base(model.model_name_or_path, model.downsample_mode, **wished, trained=trained)
    _check_trains_rows(args, base)
    _correct_llm_type(args, base.family)
    if base.in_4bit:
        _check_4bit(args, base)
    return base


def _check_trains_rows(args: Arguments, base: BaseCheckpoint) -> None:
    """Refuses to add rows that this run would not train.

    Raises:
        ArgumentError: with the flags that train them.
    """
    training = args.training
    if base.duplex is None:
        return
    if training.use_lora and zero_stage(training.deepspeed) == 3:
        raise ArgumentError(
            f"--duplex_prompt {base.duplex_name} with LoRA and ZeRO-3: peft cannot train single rows of partitioned "
            "weights; use DS_CONFIG ds_config_zero2.json, or full finetuning"
        )
    if not training.use_lora and (not training.tune_llm or training.tune_llm_layers is not None):
        raise ArgumentError(
            f"--duplex_prompt {base.duplex_name}: its rows lie in embeddings and output layer, which these flags "
            "freeze; use --tune_llm true without --tune_llm_layers, or --use_lora true"
        )


def _check_4bit(args: Arguments, base: BaseCheckpoint) -> None:
    """Refuses what weights that are stored in 4 bit cannot do: train in full, be partitioned, be quantised again.

    Raises:
        ArgumentError: with the flags or the checkpoint to use instead.
    """
    training, stored = args.training, f"{base.folder} is stored in 4 bit"
    check_adapters_only(base.folder, base.family.hub_id, use_lora=training.use_lora)
    check_quantised_stage(training, stored)
    packed = packed_weights(weight_files(base.folder))
    check_full_parts(base.folder, packed, base.family.parts, full_parts(training))
    if args.lora.q_lora:
        logger.warning("--q_lora true has no effect: %s already", stored)


def start_run(
    args: Arguments, base: BaseCheckpoint, output: OutputFolder, data: Sequence[Path]
) -> tuple[str | None, RunIdentity | None]:
    """Locks the output folder, initialises the process group, and chooses the checkpoint to resume from.

    Args:
        args: the flags.
        base: the base checkpoint.
        output: the output folder; its contents are not changed here.
        data: files of the training data, for the identity of the run.

    Returns:
        The checkpoint that every rank resumes from, or None; and on rank 0 the identity of the run.

    Raises:
        ArgumentError: ranks have different downsample modes.
        OutputError: the folder is in use, or is an input of the run.
        ResumeError: the run cannot resume from the checkpoint.
    """
    resume, identity = _prepare_output(args, base, output, data) if distributed.is_main_process() else (None, None)
    distributed.start(args.training)
    _check_same_downsample_mode(base.downsample_mode)
    resume_from = distributed.from_main_process(resume and str(resume))
    set_load_universal(args.training, resume_from)
    return resume_from, identity


def _prepare_output(
    args: Arguments, base: BaseCheckpoint, output: OutputFolder, data: Sequence[Path]
) -> tuple[Path | None, RunIdentity]:
    """Checks and locks the output folder, and chooses the checkpoint; on rank 0."""
    training = args.training
    identity = identify(args, base, data)
    resume = choose_checkpoint(training, output.folder, identity, base.downsample_mode)
    output.check(
        _inputs_of(args, base),
        side_files(base, use_lora=training.use_lora),
        use_lora=training.use_lora,
        resuming=training.resume_from_checkpoint == "auto" or (resume and resume.parent) == output.folder,
        overwrite=training.overwrite_output_dir,
    )
    output.lock()
    logger.info("%s\n%s", describe_training(args, base), args.describe())
    return convert_for_world_size(resume, output.folder), identity


def describe_training(args: Arguments, base: BaseCheckpoint) -> str:
    """What is trained of which model, by the flags, as one line."""
    training, lora = args.training, args.lora
    rank = f"LoRA r={lora.lora_r}" if lora.lora_weight_path is None else f"LoRA from {lora.lora_weight_path}"
    layers = training.tune_llm_layers
    modes = dict.fromkeys(base.family.parts, "frozen") | dict.fromkeys(full_parts(training), "full")
    if training.use_lora:
        modes |= dict.fromkeys(training.lora_parts or (), f"Q{rank}" if lora.q_lora or base.in_4bit else rank)
    elif layers is not None:
        modes["llm"] = f"{'last' if layers > 0 else 'first'} {abs(layers)} layers"
    stage = zero_stage(training.deepspeed)
    details = [f"{part} {mode}" for part, mode in modes.items()]
    details += [f"DeepSpeed ZeRO-{stage}"] if training.deepspeed else []
    details += base.choices
    return f"training {base.family.title}: {', '.join(details)}"


def _inputs_of(args: Arguments, base: BaseCheckpoint) -> list[Input]:
    """The local files and folders that the run reads."""
    given = {"--model_name_or_path": str(base.folder), "--lora_weight_path": args.lora.lora_weight_path}
    given |= {"--data_path": args.data.data_path, "--eval_data_path": args.data.eval_data_path}
    if args.data.dataset or args.data.eval_dataset:
        given["--dataset_dir"] = args.data.dataset_dir
    paths = {flag: expand(path).absolute() for flag, path in given.items() if path is not None}
    return [Input(flag, path) for flag, path in paths.items() if path.exists()]


def _check_same_downsample_mode(mode: str | None) -> None:
    """Checks that all ranks have the same downsample_mode, which may come from the environment of their machines.

    Raises:
        ArgumentError: this rank has another downsample_mode than rank 0.
    """
    if (first := distributed.from_main_process(mode)) != mode:
        rank = os.environ.get("RANK", "0")
        raise ArgumentError(
            f"downsample_mode is {mode} on rank {rank} and {first} on rank 0: set DOWNSAMPLE_MODE alike on all "
            "machines, or give --downsample_mode"
        )


def _correct_llm_type(args: Arguments, family: Family) -> None:
    """Corrects a wrong --llm_type or --template with a warning; the family is read from the checkpoint."""
    if args.model.template is not None and args.model.template not in family.llamafactory_templates:
        logger.warning(
            "template %s does not fit: the checkpoint is %s, and its own prompt format is used",
            args.model.template,
            family.title,
        )
    given = LLM_TYPES.get(args.model.llm_type or "", args.model.llm_type)
    if given is not None and given != family.llm_type:
        logger.warning(
            "LLM_TYPE %s does not fit: the checkpoint is %s, whose LLM_TYPE is %s; continuing with that",
            args.model.llm_type,
            family.title,
            family.llm_type,
        )
        args.model.llm_type = family.llm_type
