"""Checks what the flags of a run require: packages, a GPU, a hub account, other flags."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from typing import TYPE_CHECKING

from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils.import_utils import is_torch_cuda_available, is_torch_tf32_available

from finetune.utils.errors import ArgumentError

if TYPE_CHECKING:
    from finetune.arguments.data import DataArguments
    from finetune.arguments.model import LoraArguments, ModelArguments
    from finetune.arguments.training import TrainingArguments

logger = logging.getLogger(__name__)

ATTENTION = ("sdpa", "eager", "flash_attention_2")
_BITSANDBYTES = "'bitsandbytes>=0.49,<0.51'"
LOGGERS = {
    "azure_ml": "azureml-core",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": "kubeflow",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Values of --report_to and their packages."""
OPTIMIZERS = (
    (r"adamw_torch_xla", "torch_xla", "torch_xla"),
    (r"adamw_torch_npu_fused", "torch_npu", "torch_npu"),
    (r"adamw_anyprecision", "torchdistx", "torchdistx"),
    (r"adamw_torch_[48]bit", "torchao", "torchao"),
    (r"galore_.*", "galore_torch", "galore-torch"),
    (r"(ada)?lomo", "lomo_optim", "lomo-optim"),
    (r"grokadamw", "grokadamw", "grokadamw"),
    (r"schedule_free_.*", "schedulefree", "schedulefree"),
    (r"apollo_.*", "apollo_torch", "apollo-torch"),
    (r"stable_adamw", "optimi", "torch-optimi"),
    (r"paged_.*|ademamix.*|lion_.*|rmsprop_bnb.*|adamw_(bnb_)?8bit", "bitsandbytes", _BITSANDBYTES),
)
"""Patterns of --optim, the required module and its package; other optimizers need no package."""


def check_training(training: TrainingArguments) -> None:
    """Checks that packages of loggers and optimizer are installed, and the account for --push_to_hub.

    Raises:
        ArgumentError: with what to install or to give.
    """
    _check_loggers(training)
    _check_optimizer(training)
    _check_hub(training)


def check_machine(training: TrainingArguments) -> None:
    """Refuses flags that the hardware does not support, before transformers checks its own.

    Raises:
        ArgumentError: --tf32 without a GPU that supports it.
    """
    if training.tf32 and (training.use_cpu or not is_torch_tf32_available()):
        raise ArgumentError("--tf32 true needs an NVIDIA GPU of the Ampere generation or newer; omit it")


def _check_loggers(training: TrainingArguments) -> None:
    """Checks the loggers of --report_to; "all" uses the installed ones."""
    given = training.report_to if isinstance(training.report_to, list) else [training.report_to or "none"]
    training.report_to = [name for entry in given for name in entry.split(",")]  # a YAML list comes as one value
    names = [name for name in training.report_to if name not in ("", "none", "all")]
    if unknown := [name for name in names if name not in LOGGERS]:
        raise ArgumentError(f"--report_to {unknown[0]}: it is none, all or some of {', '.join(LOGGERS)}")
    installed = set(get_available_reporting_integrations())
    installed |= {"flyte"} if importlib.util.find_spec("flytekit") else set()
    if missing := [name for name in names if name not in installed]:
        raise ArgumentError(
            f"--report_to {missing[0]} is not installed: pip install {LOGGERS[missing[0]]}, or --report_to none"
        )


def _check_optimizer(training: TrainingArguments) -> None:
    name = str(getattr(training.optim, "value", training.optim))
    for pattern, module, package in OPTIMIZERS:
        if re.fullmatch(pattern, name):
            if importlib.util.find_spec(module) is None:
                raise ArgumentError(f"--optim {name} is not installed: pip install {package}, or --optim adamw_torch")
            return


def _check_hub(training: TrainingArguments) -> None:
    if not training.push_to_hub:
        return
    from huggingface_hub import get_token

    if training.hub_model_id is None:
        raise ArgumentError("--push_to_hub true needs --hub_model_id OWNER/NAME")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise ArgumentError("--push_to_hub true: HF_HUB_OFFLINE is set, nothing can be uploaded; unset it")
    if training.hub_token is None and get_token() is None:
        raise ArgumentError("--push_to_hub true needs an account: `hf auth login`, or HF_TOKEN in the environment")


def resolve_attention(model: ModelArguments) -> None:
    """Falls back from FlashAttention to SDPA if there is no GPU or no flash-attn.

    Raises:
        ArgumentError: an unknown implementation.
    """
    if model.attn_implementation not in (None, *ATTENTION):
        raise ArgumentError(f"--attn_implementation {model.attn_implementation}: it is {', '.join(ATTENTION)}")
    if model.attn_implementation != "flash_attention_2":
        return
    lacks = "no GPU" if not is_torch_cuda_available() else "no flash-attn (pip install flash-attn)"
    if not is_torch_cuda_available() or importlib.util.find_spec("flash_attn") is None:
        logger.warning("--attn_implementation flash_attention_2: there is %s; sdpa is used instead", lacks)
        model.attn_implementation = "sdpa"


def check_data(data: DataArguments, training: TrainingArguments) -> None:
    """Refuses data flags that contradict each other or the training flags.

    Raises:
        ArgumentError: naming them.
    """
    if (data.data_path is None) == (data.dataset is None):
        given = "both are given" if data.dataset else "neither is given"
        raise ArgumentError(f"{given}: --data_path (a file) or --dataset (names in dataset_info.json); give one")
    if data.val_size > 1 and data.val_size != int(data.val_size):
        raise ArgumentError(f"--val_size {data.val_size:g}: a share below 1, or a whole number of records")
    if data.streaming and training.max_steps < 1:
        raise ArgumentError("--streaming true needs --max_steps: the number of records is unknown")
    evaluation = [name for name in ("eval_data_path", "eval_dataset", "val_size") if getattr(data, name)]
    if len(evaluation) > 1:
        raise ArgumentError(f"--{' and --'.join(evaluation)} both define the evaluation data; give one of them")
    if training.do_eval and not evaluation:
        raise ArgumentError(
            "evaluation is on (--do_eval or --eval_strategy) but none of --eval_data_path, --eval_dataset and "
            "--val_size is given"
        )
    if training.eval_generate and not evaluation:
        raise ArgumentError(f"--eval_generate {training.eval_generate} needs evaluation samples: give --eval_data_path")
    _check_best(training, evaluation)


def _check_best(training: TrainingArguments, evaluation: list[str]) -> None:
    """Checks that there are evaluations, and a known metric, to choose the best checkpoint by."""
    best = training.metric_for_best_model
    strategy = str(getattr(training.eval_strategy, "value", training.eval_strategy))
    saving = str(getattr(training.save_strategy, "value", training.save_strategy))
    if (training.load_best_model_at_end or saving == "best") and (not evaluation or strategy == "no"):
        flag = "--load_best_model_at_end true" if training.load_best_model_at_end else "--save_strategy best"
        raise ArgumentError(
            f"{flag} needs evaluations to find the best checkpoint; give --eval_data_path and --eval_strategy steps"
        )
    # The metric of eval_generate is chosen when its data are read.
    if best is not None and best.removeprefix("eval_") != "loss" and not training.eval_generate:
        raise ArgumentError(
            f"--metric_for_best_model {best}: evaluation has only loss; another metric needs --eval_generate N with "
            "--eval_metric"
        )


def check_q_lora(training: TrainingArguments) -> None:
    """Refuses QLoRA with incompatible flags, or without bitsandbytes.

    Raises:
        ArgumentError: full training, ZeRO-3, or no bitsandbytes.
    """
    if not training.use_lora:
        raise ArgumentError("--q_lora true quantises a frozen LLM and trains adapters in it: it needs --use_lora true")
    config = training.deepspeed
    stage = config.get("zero_optimization", {}).get("stage", 0) if isinstance(config, dict) else 0
    if stage == 3:
        raise ArgumentError(
            "--q_lora true with ZeRO-3: quantised weights cannot be partitioned; use ds_config_zero2.json "
            "(DS_CONFIG=ds_config_zero2.json)"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ArgumentError(f"--q_lora true needs bitsandbytes: pip install {_BITSANDBYTES}")


def check_targets(lora: LoraArguments) -> None:
    """Refuses a pattern of module names that is not a valid regular expression.

    Raises:
        ArgumentError: with the error.
    """
    try:
        re.compile(lora.lora_target_modules or "")
    except re.error as error:
        raise ArgumentError(
            f"--lora_target_modules {lora.lora_target_modules!r} is not a regular expression: {error}; give one that "
            "matches full module names, or names separated by commas"
        ) from error
