"""Finetunes a MiniCPM-V checkpoint: ``torchrun finetune.py --model_name_or_path M --data_path D ...``.

The launchers finetune_ds.sh (full) and finetune_lora.sh (LoRA) call this file; ``--help`` lists every flag.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import outcome

if __name__ == "__main__":
    outcome.install()  # before torch, whose import takes seconds in which the launcher may end

from finetune import distributed
from finetune.arguments import Arguments, parse_arguments
from finetune.errors import ArgumentError, UserError
from finetune.families.base import Family
from finetune.legacy_flags import LLM_TYPES, template_fits
from finetune.paths import expand

if TYPE_CHECKING:
    from transformers import Trainer

    from dataset import StreamedDataset, SupervisedDataset
    from finetune.evaluation.run_report import RunFacts
    from finetune.tuning.checkpoint import Checkpoint
    from finetune.tuning.identity import Identity
    from finetune.tuning.output import Input, OutputFolder
    from finetune.tuning.parts import PartRow

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, saves and verifies; returns the exit status."""
    distributed.setup_logging()
    # Loader processes share the work; a tokenizer that had started threads of its own would warn when they fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args = parse_arguments(argv)
    from finetune.tuning.output import OutputFolder

    with OutputFolder(Path(args.training.output_dir or "output").absolute()) as output:
        return train(args, output)


def train(args: Arguments, output: OutputFolder) -> int:  # noqa: PLR0915 - the story is told in one piece
    """Everything behind the flags; only what has been looked at is changed."""
    from finetune.media import loader_process
    from finetune.tuning.loaders import check_kernels
    from finetune.tuning.output import LogsCallback
    from finetune.tuning.saving import write_run
    from finetune.tuning.universal import expect_converted

    loader_process.take_notes()
    # Base checkpoint: what it is, read from the folder.
    base = find_base(args)
    check_names(args, base.family)
    check_kernels(args.training, base.family, from_hub=args.model.use_hub_kernels)
    resume, identity = look_at_output(args, base, output) if distributed.is_main_process() else (None, None)

    # Tokenizer.
    distributed.start(args.training)
    check_modes(base.downsample_mode)
    resume_from = distributed.from_main_process(resume and str(resume))
    expect_converted(args.training, resume_from)
    from transformers import set_seed

    from finetune.models import load_model, load_tokenizer
    from finetune.templates.probe import check_chat_template
    from finetune.tuning.adapters import quantisation
    from finetune.tuning.parts import adapt, describe_parameters, format_table, part_rows

    set_seed(args.training.seed)
    tokenizer = load_tokenizer(base.folder)
    if args.data.thinking != "keep" and "<think>" not in tokenizer.get_vocab():
        logger.warning("--thinking %s has no effect: %s does not think", args.data.thinking, base.family.title)

    # Data: records, one encoder for training and evaluation; looked at before a device is used.
    from dataset import make_supervised_data_module
    from finetune.encoding.check import check_before_training
    from finetune.encoding.encoder import Encoder
    from finetune.encoding.intake import BAD_SAMPLES
    from finetune.tuning.plan import describe_steps

    encoder = Encoder.from_config(
        base.family,
        tokenizer,
        base.settings,
        max_length=args.training.model_max_length,
        **args.data.looking,
    )
    check_chat_template(base.family, tokenizer, encoder.layout, encoder.vocabulary)
    seed = args.training.seed if args.training.data_seed is None else args.training.data_seed
    data = make_supervised_data_module(args.data, encoder, output.folder, seed)
    train, evaluation = data["train_dataset"], data["eval_dataset"]
    if distributed.is_main_process():
        check_before_training([part.intake for part in (train, evaluation) if part is not None], args.data.check)
    logger.info("%s", describe_steps(args.training, train.samples, train.intake.fitter))

    if args.training.checkpoint_parts is not None:
        from finetune.planning.fit import settle, step_shape

        fitter, streaming = train.intake.fitter, args.data.streaming
        measured = partial(step_shape, args.training, fitter, train.samples, streaming=streaming)
        settle(base.settings, args.training, args.lora, measured)

    # Model: load, then freeze or wrap.
    dtype = args.training.compute_dtype
    quantised: dict[str, Any] = {"quantization_config": quantisation(dtype)} if args.lora.q_lora else {}
    model = load_model(
        base.folder,
        dtype=dtype,
        attn_implementation=args.model.attn_implementation,
        hub_kernels=args.model.use_hub_kernels,
        downsample_mode=base.downsample_mode,
        **quantised,
    )
    model = adapt(model, base.family, args.training, args.lora)
    rates = args.training.part_learning_rates
    rows = part_rows(model, base.family.parts, rates)
    logger.info("%s\n%s", base.family.title, format_table(rows))
    if args.model.print_param_status:
        logger.info("%s", describe_parameters(model))

    # Train, evaluate, save: from here on the output folder changes.
    if distributed.is_main_process():
        output.open()
        write_run(args, base, output.folder)
    from finetune.evaluation.progress import ProgressCallback
    from finetune.tuning.bad_share import BadShareCallback
    from finetune.tuning.keeping import Keeper
    from trainer import CPMTrainer

    progress = ProgressCallback(facts_of(args, base, rows))
    trainer = CPMTrainer(
        model=model,
        args=args.training,
        base=base,
        part_learning_rates=rates,
        check_base_loss=args.model.check_base_loss == "auto",
        keeper=Keeper(identity),
        callbacks=[progress, LogsCallback(output), BadShareCallback(train.intake)],
        output=output,
        **data,
    )
    progress.answered = () if trainer.generated is None else trainer.generated.answered
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model()
    if evaluation is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        logger.info("eval_loss %.4f over %d answer tokens", metrics["eval_loss"], metrics["eval_tokens"])
    trainer.save_state()
    progress.on_save(args.training, trainer.state, trainer.control)
    report_samples(trainer, train, output.folder)
    trouble = trainer.keeper.trouble(args.training)

    # Verify in a fresh process, once this one has released its devices.
    from finetune.tuning.verification import take_reference, verify_in_fresh_process

    reference = None
    if args.training.verify_adapter == "auto":
        example = train.first_usable()
        reference = take_reference(trainer, example, encoder.pad_id, dtype, args.lora.q_lora)
    history = trainer.state.log_history
    result = {
        "output_dir": str(output.folder),
        "steps": trainer.state.global_step,
        "train_loss": outcome.mean_train_loss(history),
        "eval_loss": outcome.last_eval_loss(history),
        "skipped_samples": outcome.distinct_lines(output.folder / BAD_SAMPLES),
    }
    distributed.stop()
    del trainer, model
    distributed.free_memory()
    verified = None if reference is None else verify_in_fresh_process(output.folder, reference) == 0
    status = outcome.NOT_VERIFIED if verified is False else outcome.OK
    if status == outcome.OK and distributed.is_main_process():
        if trouble is not None:
            raise trouble
        output.finish()
    outcome.report("error" if status else "ok", exit_code=status, **result, verified=verified)
    return status


def facts_of(args: Arguments, base: Checkpoint, rows: Sequence[PartRow]) -> RunFacts:
    """What the run is, for its page."""
    from finetune.evaluation.run_report import RunFacts
    from finetune.media.image import MAX_PIXELS

    return RunFacts(
        base=base.name,
        family=base.family.title,
        adapter=args.training.use_lora,
        parts=[(row.part, row.mode, row.total, row.trainable, row.learning_rate) for row in rows],
        flags=[(name, value, args.origin(name)) for name, value in args.non_defaults().items()],
        max_pixels=args.data.max_image_pixels or MAX_PIXELS,
    )


def report_samples(trainer: Trainer, train: SupervisedDataset | StreamedDataset, output: Path) -> None:
    """What became of the training samples on all ranks, and how many records are listed as left out."""
    import torch

    from finetune.encoding.intake import BAD_SAMPLES, describe_bad_samples, describe_counts

    counts = trainer.accelerator.reduce(torch.tensor(train.intake.counts(), device=trainer.args.device))
    assert isinstance(counts, torch.Tensor)
    logger.info("%s", describe_counts(counts.tolist()))
    if (bad := describe_bad_samples(output / BAD_SAMPLES)) is not None:
        logger.warning("%s", bad)


def find_base(args: Arguments) -> Checkpoint:
    """The base checkpoint; its downsample_mode may be that of the adapter which is gone on from."""
    from finetune.tuning.checkpoint import resolve

    former = args.lora.lora_weight_path if args.training.use_lora else None
    trained = None if former is None else Path(former)
    base = resolve(args.model.model_name_or_path, args.model.downsample_mode, trained=trained)
    if base.mode is not None:
        logger.info("%s", base.mode)
    return base


def look_at_output(args: Arguments, base: Checkpoint, output: OutputFolder) -> tuple[Path | None, Identity]:
    """Makes sure that this run, and no other, may write its output folder.

    Returns:
        the checkpoint it goes on from, and what the run is.
    """
    from dataset import data_files
    from finetune.tuning.checkpoint import side_files
    from finetune.tuning.identity import identify
    from finetune.tuning.resume import choose_checkpoint
    from finetune.tuning.universal import for_processes

    training = args.training
    identity = identify(args, base, data_files(args.data))
    resume = choose_checkpoint(training, output.folder, identity, base.downsample_mode)
    output.check(
        inputs_of(args, base),
        side_files(base, use_lora=training.use_lora),
        use_lora=training.use_lora,
        resuming=training.resume_from_checkpoint == "auto" or (resume and resume.parent) == output.folder,
        overwrite=training.overwrite_output_dir,
    )
    output.own()
    logger.info("%s", args.describe())
    return for_processes(resume, output.folder), identity


def inputs_of(args: Arguments, base: Checkpoint) -> list[Input]:
    """What the run reads, as far as it is files and folders here."""
    from finetune.tuning.output import Input

    given = {"--model_name_or_path": str(base.folder), "--lora_weight_path": args.lora.lora_weight_path}
    given |= {"--data_path": args.data.data_path, "--eval_data_path": args.data.eval_data_path}
    if args.data.dataset or args.data.eval_dataset:
        given["--dataset_dir"] = args.data.dataset_dir
    paths = {flag: expand(path).absolute() for flag, path in given.items() if path is not None}
    return [Input(flag, path) for flag, path in paths.items() if path.exists()]


def check_modes(mode: str | None) -> None:
    """Checks that all ranks look at images alike, whatever the environment of their machines says.

    Raises:
        ArgumentError: this rank has another downsample_mode than rank 0.
    """
    if (first := distributed.from_main_process(mode)) != mode:
        rank = os.environ.get("RANK", "0")
        raise ArgumentError(
            f"downsample_mode is {mode} on rank {rank} and {first} on rank 0: set DOWNSAMPLE_MODE alike on all "
            "machines, or give --downsample_mode"
        )


def check_names(args: Arguments, family: Family) -> None:
    """Corrects a wrong --llm_type or --template with a warning; the family is read from the checkpoint."""
    if args.model.template is not None and not template_fits(args.model.template, family.name):
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


if __name__ == "__main__":
    try:
        status = main()
    except UserError as error:
        status = error.exit_code
        message = outcome.print_error(error)
        outcome.report("stopped" if status == outcome.STOPPED else "error", exit_code=status, message=message)
    outcome.leave(status)
