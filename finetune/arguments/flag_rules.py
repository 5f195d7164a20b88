"""Checks of flags without importing torch: conflicts between flags, missing packages.

Flags are given by name with their values; one that is absent or None has its default.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from finetune.arguments.preference import check_preference
from finetune.utils.errors import ArgumentError

Flags = Mapping[str, Any]

_BITSANDBYTES = "'bitsandbytes>=0.49,<0.51'"
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
TRACKERS = {
    "azure_ml": ("azureml", "azureml-core"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub mlflow"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "kubeflow": ("kubeflow", "kubeflow"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "'swanlab<0.8'"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
"""Values of --report_to, the required module and its package."""
# tensorboardX writes the same files.
_INSTEAD = {"tensorboard": "tensorboardX"}
_RESUME_VALUES = {"none": None, "false": None, "auto": "auto", "true": "auto"}


def check_rules(flags: Flags) -> None:
    """Checks every rule of this module.

    Raises:
        ArgumentError: flags that contradict each other, or a package that is not installed.
    """
    check_method(flags)
    check_preference(flags)
    check_trackers(flags)
    _check_optimizer(_word(flags, "optim", ""))
    _check_q_lora(flags)
    check_data(flags)


def check_method(flags: Flags) -> None:
    """Refuses LoRA and full training of the LLM at once, and two precisions.

    Raises:
        ArgumentError: naming the flags.
    """
    if flags.get("use_lora") and flags.get("tune_llm"):
        raise ArgumentError(
            "--use_lora true trains adapters in the LLM, --tune_llm true trains the LLM in full: choose one (LoRA "
            "needs --tune_llm false)"
        )
    if flags.get("bf16") and flags.get("fp16"):
        raise ArgumentError("--bf16 true and --fp16 true: choose one (bf16 if the GPU supports it)")


def resume_choice(given: str | None) -> str | None:
    """The value of --resume_from_checkpoint: None, "auto" or a folder."""
    return _RESUME_VALUES.get((given or "none").lower(), given)


def trackers(flags: Flags) -> list[str]:
    """The values of --report_to; a list of a YAML file comes as one value."""
    given = flags.get("report_to") or []
    return [name for entry in (given if isinstance(given, list) else [given]) for name in entry.split(",")]


def check_trackers(flags: Flags) -> None:
    """Refuses trackers that are unknown or not installed.

    Raises:
        ArgumentError: with what to install.
    """
    names = [name for name in trackers(flags) if name not in ("", "none", "all")]
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ArgumentError(f"--report_to {unknown[0]}: it is none, all or some of {', '.join(TRACKERS)}")
    for name in names:
        module, package = TRACKERS[name]
        if not any(_is_installed(each) for each in (module, _INSTEAD.get(name, module))):
            raise ArgumentError(f"--report_to {name} is not installed: pip install {package}, or --report_to none")


def _check_optimizer(name: str) -> None:
    for pattern, module, package in OPTIMIZERS:
        if re.fullmatch(pattern, name):
            if not _is_installed(module):
                raise ArgumentError(f"--optim {name} is not installed: pip install {package}, or --optim adamw_torch")
            return


def _check_q_lora(flags: Flags) -> None:
    """Refuses QLoRA without adapters, or without bitsandbytes."""
    if not flags.get("q_lora"):
        return
    if not flags.get("use_lora"):
        raise ArgumentError("--q_lora true quantises a frozen LLM and trains adapters in it: it needs --use_lora true")
    if not _is_installed("bitsandbytes"):
        raise ArgumentError(f"--q_lora true needs bitsandbytes: pip install {_BITSANDBYTES}")


def check_data(flags: Flags) -> None:
    """Refuses data flags that contradict each other or the training flags.

    Raises:
        ArgumentError: naming them.
    """
    if flags.get("data_path") is None and flags.get("dataset") is None:
        raise ArgumentError("--data_path is missing: a data file (or --dataset NAME of dataset_info.json)")
    if flags.get("data_path") is not None and flags.get("dataset") is not None:
        raise ArgumentError("--data_path (a file) and --dataset (names in dataset_info.json) are both given; give one")
    val_size = flags.get("val_size") or 0
    if val_size > 1 and val_size != int(val_size):
        raise ArgumentError(f"--val_size {val_size:g}: a share below 1, or a whole number of records")
    if flags.get("streaming") and (flags.get("max_steps") or 0) < 1:
        raise ArgumentError("--streaming true needs --max_steps: the number of records is unknown")
    evaluation = [name for name in ("eval_data_path", "eval_dataset", "val_size") if flags.get(name)]
    if len(evaluation) > 1:
        raise ArgumentError(f"--{' and --'.join(evaluation)} both define the evaluation data; give one of them")
    if (flags.get("do_eval") or _word(flags, "eval_strategy", "no") != "no") and not evaluation:
        raise ArgumentError(
            "evaluation is on (--do_eval or --eval_strategy) but none of --eval_data_path, --eval_dataset and "
            "--val_size is given"
        )
    if flags.get("eval_generate") and not evaluation:
        raise ArgumentError(f"--eval_generate {flags['eval_generate']} needs evaluation samples: give --eval_data_path")
    _check_best(flags, evaluation)


def _check_best(flags: Flags, evaluation: list[str]) -> None:
    """Checks that there are evaluations, and a known metric, to choose the best checkpoint by."""
    best = flags.get("metric_for_best_model")
    at_end = bool(flags.get("load_best_model_at_end"))
    wanted = at_end or _word(flags, "save_strategy", "steps") == "best"
    if wanted and (not evaluation or _word(flags, "eval_strategy", "no") == "no"):
        flag = "--load_best_model_at_end true" if at_end else "--save_strategy best"
        raise ArgumentError(
            f"{flag} needs evaluations to find the best checkpoint; give --eval_data_path and --eval_strategy steps"
        )
    # The metric of eval_generate is chosen when its data are read.
    if best is not None and best.removeprefix("eval_") != "loss" and not flags.get("eval_generate"):
        raise ArgumentError(
            f"--metric_for_best_model {best}: evaluation has only loss; another metric needs --eval_generate N with "
            "--eval_metric"
        )


def _word(flags: Flags, name: str, default: str) -> str:
    """The text of a flag that may be a member of an enumeration."""
    value = flags.get(name)
    return default if value is None else str(getattr(value, "value", value))


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
