"""``--help`` on the flags of training, built from source text without importing torch."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Sequence

from finetune.arguments.data import VIDEO_FLAGS
from finetune.arguments.flag_names import Flag, own_flags, transformers_flags

_USAGE = "%(prog)s [FILE.yaml] --model_name_or_path MODEL --data_path FILE [flags]"
_EPILOG = "--help_all lists the other flags of transformers too. Every flag may stand in FILE.yaml without its dashes."
# Titles by the class that declares the flags.
_TITLES = {
    "ModelArguments": "model",
    "DataArguments": "data",
    "TrainingArguments": "training",
    "LoraArguments": "LoRA",
    "BatchArguments": "packing",
    "PreferenceArguments": "preference training (--stage dpo)",
    "MemoryArguments": "memory",
    "EndingArguments": "signals and hanging runs",
}
_VIDEO = "video"
_COMMON, _OTHER = "flags of transformers that are often used", "other flags of transformers"
# Those that the launchers and the documentation use.
_OFTEN = ("num_train_epochs", "max_steps", "gradient_accumulation_steps", "gradient_checkpointing", "deepspeed")
_OFTEN += ("weight_decay", "adam_beta2", "warmup_steps", "lr_scheduler_type", "max_grad_norm", "optim", "seed")
_OFTEN += ("do_eval", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit")
_OFTEN += ("train_sampling_strategy", "use_cpu")
_VALUES = {"bool": "true|false", "int": "N", "float": "X"}


def asked_help(argv: Sequence[str], prog: str = "finetune.py") -> str | None:
    """The help that a command line asks for; None if it asks for none."""
    if "--help_all" in argv:
        return help_text(prog, everything=True)
    return help_text(prog) if {"-h", "--help"} & set(argv) else None


def help_text(prog: str, *, everything: bool = False) -> str:
    """The flags in groups: our own and the usual ones of transformers, or everything."""
    parser = argparse.ArgumentParser(prog, usage=_USAGE, add_help=False, epilog=None if everything else _EPILOG)
    ours, theirs = own_flags(), transformers_flags()
    groups: dict[str, list[Flag]] = {}
    for flag in ours.values():
        title = _VIDEO if flag.name in VIDEO_FLAGS else _TITLES[flag.declared_in]
        groups.setdefault(title, []).append(flag)
    rest = {name: flag for name, flag in theirs.items() if name not in ours}
    groups[_COMMON] = [rest[name] for name in _OFTEN if name in rest]
    if everything:
        groups[_OTHER] = [flag for name, flag in rest.items() if name not in _OFTEN]
    for title, flags in groups.items():
        _add(parser, title, flags)
    return parser.format_help().rstrip()


def _add(parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag]) -> None:
    group = parser.add_argument_group(title)
    for flag in flags:
        words = flag.help or ""
        if flag.default not in (None, "None", "''") and "Default" not in words:
            words = f"{words} Default: {_plain(flag.default)}."
        group.add_argument(f"--{flag.name}", metavar=_value(flag), help=" ".join(words.split()).replace("%", "%%"))


def _plain(text: str) -> str:
    """A default as it is typed."""
    try:
        value = ast.literal_eval(text)
    except ValueError:  # a name
        return text
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(flag: Flag) -> str:
    """What stands behind the flag."""
    if flag.choices:
        return "|".join(flag.choices)
    kinds = [kind.strip() for kind in flag.annotation.split("|")]
    known = [_VALUES[kind] for kind in kinds if kind in _VALUES]
    if known:
        return known[-1]
    return "TEXT ..." if "list" in flag.annotation else "TEXT"
