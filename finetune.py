"""Finetunes a MiniCPM-V checkpoint: ``torchrun finetune.py --model_name_or_path M --data_path D ...``.

The launchers finetune_ds.sh (full) and finetune_lora.sh (LoRA) call this file; ``--help`` lists its own flags,
``--help_all`` those of transformers too.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.runtime import distributed, outcome
from finetune.runtime.imports import TRAINING_MODULES, import_at_start, libraries_hidden, optional_libraries_hidden
from finetune.runtime.waiting_process import WaitingProcess
from finetune.utils.errors import UserError, silence_unactionable_warnings

if TYPE_CHECKING:
    from dataset import DataModule
    from finetune.arguments.parse import Arguments
    from finetune.checkpoints.base_checkpoint import BaseCheckpoint
    from finetune.checkpoints.hub_upload import HubUpload
    from finetune.checkpoints.output_folder import OutputFolder
    from finetune.checkpoints.run_identity import RunIdentity
    from finetune.encoding.encoder import Encoder
    from finetune.evaluation.progress_files import ProgressCallback
    from finetune.evaluation.training_report import RunFacts
    from finetune.planning.out_of_memory_report import OutOfMemoryReport
    from finetune.planning.training_setup import SampleShape
    from finetune.training.freezing import PartRow
    from trainer import CPMTrainer

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, verifier: WaitingProcess | None = None) -> int:
    """Trains, saves and verifies; returns the exit status."""
    distributed.setup_logging()
    # Dataloader workers tokenize in parallel; threads of the tokenizers library would warn when they are forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from finetune.arguments.parse import parse_arguments
    from finetune.checkpoints.output_folder import OutputFolder

    args = parse_arguments(argv)
    # accelerate imports DeepSpeed where it finds it, to ask whether the model is one of its engines.
    unused = () if args.training.deepspeed else ("deepspeed",)
    with libraries_hidden(*unused), OutputFolder(Path(args.training.output_dir or "output").absolute()) as output:
        return train(args, output, verifier)


def prepare() -> WaitingProcess | None:
    """Imports what training needs; on a CPU, forks the process that will verify, before this one has any state.

    On a GPU a process of its own is started at the end: CUDA does not survive a fork.
    """
    import_at_start(*TRAINING_MODULES)
    import torch

    from finetune.__main__ import main as run_command

    return None if torch.cuda.is_available() or not distributed.is_main_process() else WaitingProcess(run_command)


def train(args: Arguments, output: OutputFolder, verifier: WaitingProcess | None = None) -> int:
    """The recipe: checks everything before the output folder changes, trains, verifies the result in a new process."""
    from dataset import data_files
    from finetune.batching.dataloaders import check_kernels
    from finetune.checkpoints.run_start import find_base, start_run
    from finetune.media import worker_process

    worker_process.enable_worker_reports()

    # ---- Model: the base checkpoint, its tokenizer and chat template; weights are loaded once the data is checked ----
    base = find_base(args)
    check_kernels(args.training, base.family, from_hub=args.model.use_hub_kernels)
    resume_from, identity = start_run(args, base, output, data_files(args.data))
    encoder = make_encoder(args, base)

    # ---- Data: records, checked one by one ----
    data = make_data(args, encoder, output.folder)
    choose_recomputed_parts(args, base, data)

    # ---- Training: load, train, save, evaluate ----
    upload = make_upload(args)
    with out_of_memory_report(args, base, data) as report:
        trainer, progress = make_trainer(args, base, data, output, identity, upload)
        report.watch(trainer)
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.save_model()
        result = finish(args, trainer, progress, data)
        unsaved = trainer.checkpoint_manager.final_error(args.training)
        reference = verification_reference(args, trainer, data)
    distributed.stop()
    report.watch(None)
    del trainer  # frees the device memory for the process that verifies
    distributed.free_memory()
    status = None if reference is None else verify(output, reference, verifier)
    return end(output, status, result, unsaved, upload)


def make_encoder(args: Arguments, base: BaseCheckpoint) -> Encoder:
    """The encoder of the checkpoint (tokenizer, chat template, image settings), which turns samples into tensors."""
    from transformers import set_seed

    from finetune.encoding.chat_template_check import check_chat_template
    from finetune.encoding.encoder import Encoder
    from finetune.tokenizers.tokenization import load_tokenizer

    set_seed(args.training.seed)
    tokenizer = load_tokenizer(base.folder, duplex_prompt=base.duplex_name)
    if args.data.thinking != "keep" and "<think>" not in tokenizer.get_vocab():
        logger.warning("--thinking %s has no effect: %s has no thinking mode", args.data.thinking, base.family.title)
    encoder = Encoder(
        base.family,
        tokenizer,
        base.settings,
        max_length=args.training.model_max_length,
        duplex=base.duplex_name,
        **args.data.encoding,
    )
    check_chat_template(base.family, tokenizer, encoder.layout, encoder.prompt_tokenizer)
    return encoder


def make_data(args: Arguments, encoder: Encoder, output: Path) -> DataModule:
    """Training and evaluation set; every record is checked before a device is used."""
    from dataset import make_supervised_data_module
    from finetune.data_check.check_records import check_before_training
    from finetune.data_check.decision_counts import check_weighted
    from finetune.sample import as_sample_set
    from finetune.training.step_summary import describe_steps

    seed = args.training.seed if args.training.data_seed is None else args.training.data_seed
    data = make_supervised_data_module(args.data, encoder, output, seed)
    train, evaluation = data["train_dataset"], data["eval_dataset"]
    check_weighted(as_sample_set(train.samples), encoder.unit_weights)
    if distributed.is_main_process():
        check_before_training([part.sample_policy for part in (train, evaluation) if part is not None], args.data.check)
    logger.info("%s", describe_steps(args.training, train.samples, train.sample_policy.length_policy))
    return data


def choose_recomputed_parts(args: Arguments, base: BaseCheckpoint, data: DataModule) -> None:
    """Chooses the parts whose layers are recomputed, by the memory of the GPU and the largest micro-batch."""
    if args.training.checkpoint_parts is None:
        return
    from finetune.planning.recompute_choice import choose_parts

    choose_parts(base.settings, args.training, args.lora, largest_step(args, data))


def largest_step(args: Arguments, data: DataModule) -> Callable[[], SampleShape]:
    """A function that measures the largest micro-batch of the run."""
    from finetune.planning.recompute_choice import step_shape

    train = data["train_dataset"]
    return partial(
        step_shape, args.training, train.sample_policy.length_policy, train.samples, streaming=args.data.streaming
    )


def out_of_memory_report(args: Arguments, base: BaseCheckpoint, data: DataModule) -> OutOfMemoryReport:
    """Adds to an error of GPU memory the flags with which a step fits, by the memory estimate."""
    from finetune.planning.out_of_memory_report import OutOfMemoryReport

    return OutOfMemoryReport(base.settings, args.training, args.lora, largest_step(args, data))


def make_model(args: Arguments, base: BaseCheckpoint) -> tuple[Any, list[PartRow]]:
    """The loaded model, frozen or wrapped with adapters by the flags, and the table of what trains per part."""
    from finetune.models import load_model
    from finetune.models.duplex_rows import add_duplex_rows
    from finetune.training.freezing import adapt, describe_parameters, format_table, part_rows
    from finetune.training.lora import quantisation

    dtype = args.training.compute_dtype
    quantise = args.lora.q_lora and not base.in_4bit
    quantised: dict[str, Any] = {"quantization_config": quantisation(dtype)} if quantise else {}
    model = load_model(
        base.folder,
        dtype=dtype,
        attn_implementation=args.model.attn_implementation,
        hub_kernels=args.model.use_hub_kernels,
        downsample_mode=base.downsample_mode,
        **quantised,
    )
    if base.duplex is not None:
        add_duplex_rows(model)
    with optional_libraries_hidden(unless=args.lora.q_lora or base.in_4bit):  # peft looks for layers of bitsandbytes
        model = adapt(model, base.family, args.training, args.lora)
    rows = part_rows(model, base.family.parts, args.training.part_learning_rates)
    logger.info("%s", format_table(rows))
    if args.model.print_param_status:
        logger.info("%s", describe_parameters(model))
    return model, rows


def make_upload(args: Arguments) -> HubUpload | None:
    """The uploads of --push_to_hub; the repository is created before anything is trained."""
    from finetune.checkpoints.hub_upload import HubUpload

    upload = HubUpload.take_over(args.training)
    if upload is not None and distributed.is_main_process():
        upload.create()
    return upload


def make_trainer(
    args: Arguments,
    base: BaseCheckpoint,
    data: DataModule,
    output: OutputFolder,
    identity: RunIdentity | None,
    upload: HubUpload | None,
) -> tuple[CPMTrainer, ProgressCallback]:
    """The Trainer with its callbacks; the output folder is written from here on."""
    from finetune.checkpoints.checkpoint_manager import CheckpointManager
    from finetune.checkpoints.output_folder import LogsCallback
    from finetune.checkpoints.saving import write_run
    from finetune.evaluation.progress_files import ProgressCallback
    from finetune.training.bad_share import BadShareCallback

    model, rows = make_model(args, base)
    if distributed.is_main_process():
        output.open()
        write_run(args, base, output.folder)
    progress = ProgressCallback(run_facts(args, base, rows))
    trainer = trainer_class(args, base)(
        model=model,
        args=args.training,
        base=base,
        part_learning_rates=args.training.part_learning_rates,
        check_base_loss=args.model.check_base_loss == "auto",
        checkpoint_manager=CheckpointManager(identity, upload and upload.checkpoint),
        callbacks=[progress, LogsCallback(output), BadShareCallback(data["train_dataset"].sample_policy)],
        output=output,
        **data,
    )
    progress.answered = () if trainer.generated is None else trainer.generated.answered
    return trainer, progress


def trainer_class(args: Arguments, base: BaseCheckpoint) -> Callable[..., CPMTrainer]:
    """The Trainer of the stage, for preference training with its loss and the name of its reference model."""
    from trainer import CPMTrainer

    if args.data.stage == "sft":
        return CPMTrainer
    from finetune.arguments.preference import options_of
    from finetune.checkpoints.run_identity import reference_key
    from preference_trainer import PreferenceTrainer

    return partial(
        PreferenceTrainer,
        preference=options_of(args.training),
        reference_key=reference_key(args, base),
        base_is_start=args.training.use_lora and not args.lora.lora_weight_path and args.lora.lora_bias == "none",
    )


def run_facts(args: Arguments, base: BaseCheckpoint, rows: Sequence[PartRow]) -> RunFacts:
    """The facts about the run in report.html."""
    from finetune.evaluation.training_report import RunFacts
    from finetune.media.image import MAX_PIXELS

    return RunFacts(
        base=base.name,
        family=base.family.title,
        adapter=args.training.use_lora,
        parts=[(row.part, row.mode, row.total, row.trainable, row.learning_rate) for row in rows],
        flags=args.flags_with_origins(),
        max_pixels=args.data.max_image_pixels or MAX_PIXELS,
    )


def finish(args: Arguments, trainer: CPMTrainer, progress: ProgressCallback, data: DataModule) -> dict[str, Any]:
    """Evaluates and writes logs and state of the run; returns the values of the ``result=`` line."""
    from finetune.checkpoints.model_card import add_training, code_note
    from finetune.encoding.sample_policy import BAD_SAMPLES, count_bad_samples
    from finetune.training.log_history import last_eval_loss, mean_train_loss

    output = Path(args.training.output_dir or "output").absolute()
    if data["eval_dataset"] is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        logger.info("eval_loss %.4f over %d answer tokens", metrics["eval_loss"], metrics["eval_tokens"])
    trainer.save_state()
    progress.on_save(args.training, trainer.state, trainer.control)
    report_samples(trainer, data, output)
    history = trainer.state.log_history
    result = {
        "output_dir": str(output),
        "steps": trainer.state.global_step,
        "train_loss": mean_train_loss(history),
        "eval_loss": last_eval_loss(history),
        "skipped_samples": count_bad_samples(output / BAD_SAMPLES),
    }
    if distributed.is_main_process():
        samples = None if args.data.streaming else len(data["train_dataset"].samples)
        add_training(output / "README.md", args.flags_with_origins(), {"samples": samples, **result})
        if (note := code_note(output)) is not None:
            logger.info("%s", note)
    return result


def report_samples(trainer: CPMTrainer, data: DataModule, output: Path) -> None:
    """Logs how many training samples were kept, shortened and skipped, over all ranks."""
    import torch

    from finetune.encoding.sample_policy import BAD_SAMPLES, describe_bad_samples, describe_counts

    own = torch.tensor(data["train_dataset"].sample_policy.counts(), device=trainer.args.device)
    counts = trainer.accelerator.reduce(own)
    assert isinstance(counts, torch.Tensor)
    if (encoded := describe_counts(counts.tolist())) is not None:
        logger.info("%s", encoded)
    if (bad := describe_bad_samples(output / BAD_SAMPLES)) is not None:
        logger.warning("%s", bad)


def verification_reference(args: Arguments, trainer: CPMTrainer, data: DataModule) -> Path | None:
    """Logits of the trained model, to compare the saved result with; None with --verify_adapter off."""
    from finetune.checkpoints.verification import take_reference

    if args.training.verify_adapter != "auto":
        return None
    train = data["train_dataset"]
    pad_id = train.sample_policy.length_policy.encoder.pad_id
    quantised = args.lora.q_lora and not trainer.base.in_4bit
    return take_reference(trainer, train.first_usable(), pad_id, args.training.compute_dtype, quantised)


def verify(output: OutputFolder, reference: Path, verifier: WaitingProcess | None) -> int:
    """Loads the result in a fresh process and compares logits; returns the exit status of that."""
    from finetune.checkpoints.verification import verify_in_fresh_process

    return verify_in_fresh_process(output.folder, reference, verifier)


def end(
    output: OutputFolder,
    status: int | None,
    result: dict[str, Any],
    unsaved: UserError | None,
    upload: HubUpload | None,
) -> int:
    """Uploads what was asked for; reports and returns the exit status of the run.

    Raises:
        UserError: ``unsaved``, the error of a checkpoint that could not be saved; or a result that was not uploaded.
    """
    verified = None if status is None else status != outcome.NOT_VERIFIED
    status = status or outcome.OK
    if status == outcome.OK and distributed.is_main_process():
        if unsaved is not None:
            raise unsaved
        output.finish()
        if upload is not None:
            result["uploaded"] = upload.result(output.folder)
    if status == outcome.UNUSABLE_RESULT:
        result |= {"message": "the adapter changes nothing"}
    outcome.report("error" if status else "ok", exit_code=status, **result, verified=verified)
    return status


if __name__ == "__main__":
    from finetune.arguments.flag_help import asked_help

    if (text := asked_help(sys.argv[1:])) is not None:
        print(text)
        sys.exit(outcome.OK)
    outcome.install_exit_handlers()  # before torch, whose import takes seconds in which the launcher may end
    silence_unactionable_warnings()  # before the libraries that warn while they are imported
    with outcome.ReportedErrors():
        try:
            status = main(verifier=prepare())
        except UserError as error:
            status = error.exit_code
            message = outcome.print_error(error)
            outcome.report("stopped" if status == outcome.STOPPED else "error", exit_code=status, message=message)
    outcome.exit_after_handlers(status)
