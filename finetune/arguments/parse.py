"""Parses and validates the command line of finetune.py; records the origin of every value."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields
from enum import Enum
from typing import Any, NamedTuple, NoReturn

import yaml
from transformers import HfArgumentParser

from finetune.arguments.argv import parse_flags
from finetune.arguments.data import DataArguments
from finetune.arguments.flag_names import takes_many
from finetune.arguments.flag_rules import check_rules
from finetune.arguments.model import LoraArguments, ModelArguments, check_lora
from finetune.arguments.ranges import check_not_empty, check_objects, check_ranges
from finetune.arguments.requirements import check_quantised_stage, check_targets, check_training, resolve_attention
from finetune.arguments.resolve import Resolved, refuse_unknown, resolve
from finetune.arguments.training import TrainingArguments, check_streamed_batches, warn_of_low_rate
from finetune.utils.errors import ArgumentError, UserError
from finetune.utils.number_format import significant

logger = logging.getLogger(__name__)

# Origins of flags: typed, or among the defaults of finetune_lora.sh and finetune_ds.sh, or computed from others.
COMMAND_LINE, LAUNCHER, DERIVED = "command line", "launcher default", "derived"
# How many arguments at the end of the command line the user gave; those before them are the launcher's.
_USER_ARGS = "FINETUNE_USER_ARGS"

# What PyYAML puts behind a single value.
_DOCUMENT_END = "\n...\n"

# Secrets, and objects that transformers derives from other flags.
_NOT_RECORDED = ("hub_token", "accelerator_config")

GROUPS = (ModelArguments, DataArguments, TrainingArguments, LoraArguments)


class Arguments(NamedTuple):
    """All parsed and validated flags."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    lora: LoraArguments
    origins: Mapping[str, str] = {}
    """Where each flag was given; other flags have their default or are derived."""

    def non_defaults(self) -> dict[str, Any]:
        """Every flag whose resolved value differs from its default, by name, in plain YAML types."""
        return {entry.name: _plain(value) for entry, value in self._recordable() if value != entry.default}

    def flags_with_origins(self) -> list[tuple[str, Any, str]]:
        """The same flags with their origins: (name, value, origin)."""
        return [(name, value, self.origin(name)) for name, value in self.non_defaults().items()]

    def _recordable(self) -> Iterator[tuple[Field[Any], Any]]:
        """Every flag that has a value and may be recorded."""
        for arguments in (self.model, self.data, self.training, self.lora):
            for entry in fields(arguments):
                value = getattr(arguments, entry.name)
                if value not in (None, [], "") and entry.name not in _NOT_RECORDED:
                    yield entry, value

    def origin(self, name: str) -> str:
        """Where the value of a flag comes from."""
        return self.origins.get(name, DERIVED)

    def describe(self) -> str:
        """The flags that the user gave, one a line, with their origins unless typed; run.yaml has the others too."""
        values = {entry.name: _plain(value) for entry, value in self._recordable() if self._is_given(entry.name)}
        width = max(map(len, values), default=0)
        lines = []
        for name, value in values.items():
            file, _, key = self.origin(name).partition(": ")
            origin = "" if file == COMMAND_LINE else f"  ({file if key == name else self.origin(name)})"
            lines.append(f"  {name:<{width}}  {_short(value)}{origin}")
        return "\n".join(lines)

    def _is_given(self, name: str) -> bool:
        origin = self.origin(name)
        return origin not in (DERIVED, LAUNCHER) and not origin.startswith("LLaMA-Factory's default")

    def to_yaml(self) -> str:
        """The same as YAML that finetune.py accepts; values derived from other flags or the machine are comments."""
        lines = []
        for name, value in self.non_defaults().items():
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=sys.maxsize)
            comment = "" if name in self.origins else "# "
            lines.append(f"  {comment}{name}: {text.removesuffix(_DOCUMENT_END).strip()}  # {self.origin(name)}")
        return "\n".join(["flags:", *lines, ""])


def _short(value: Any) -> str:
    if isinstance(value, dict) and "zero_optimization" in value:
        return f"ZeRO stage {value['zero_optimization'].get('stage', 0)}"
    if isinstance(value, list):
        return " ".join(map(_short, value))
    text = significant(value, 6) if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parses and validates the command line, which may begin with a YAML file of flags.

    Raises:
        ArgumentError: unknown or contradicting flags.
    """
    known = takes_many()
    resolved = resolve(sys.argv[1:] if argv is None else argv, known)
    model, data, training, lora = _groups(resolved, known)
    if "do_train" in resolved.origins and not training.do_train:
        raise ArgumentError(
            f"{resolved.origins['do_train']} false: this command trains; use `python -m finetune evaluate` to evaluate"
        )
    if training.do_predict:
        raise ArgumentError("--do_predict true is not training: `python -m finetune evaluate` predicts and scores")
    check_rules({**vars(model), **vars(data), **vars(training), **vars(lora)})
    check_training(training)
    if data.stage == "sft":
        warn_of_low_rate(training)
    resolve_attention(model)
    if data.image_backend == "fast" and importlib.util.find_spec("simplejpeg") is None:
        logger.warning("--image_backend fast has no effect without simplejpeg: pip install -e '.[fast]'")
    if lora.q_lora:
        check_quantised_stage(training)
    check_lora(lora, use_lora=training.use_lora)
    check_targets(lora)
    if data.streaming:
        check_streamed_batches(training)
    origins = resolved.origins if argv is not None else _mark_launcher_defaults(resolved.origins, sys.argv[1:])
    return Arguments(model, data, training, lora, origins)


def _mark_launcher_defaults(origins: Mapping[str, str], argv: Sequence[str]) -> dict[str, str]:
    """The origins, with LAUNCHER for every flag that only the launcher gave."""
    count = os.environ.get(_USER_ARGS, "")
    start = max(len(argv) - int(count), 0) if count.isdecimal() else 0
    (defaults, _), (own, _) = parse_flags(argv[:start]), parse_flags(argv[start:])
    only = {name for name in defaults if name not in own}
    return {name: LAUNCHER if name in only and origin == COMMAND_LINE else origin for name, origin in origins.items()}


class _Parser(HfArgumentParser):
    """Raises a one-line error instead of printing the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message}; --help lists every flag")


def _groups(resolved: Resolved, known: Mapping[str, bool]) -> tuple[Any, ...]:
    """The flags as dataclasses; ranges are checked before the dataclasses are created.

    Raises:
        ArgumentError: invalid values, including those that transformers refuses.
    """
    parser = _Parser(GROUPS, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    check_not_empty(resolved.argv)
    values, unknown = parser.parse_known_args(resolved.argv)
    if unknown:
        refuse_unknown(unknown, [f"--{name}" for name in known])
    check_ranges(vars(values), resolved.origins)
    check_objects(vars(values))
    try:
        return parser.parse_args_into_dataclasses(resolved.argv)
    except UserError:
        raise
    except (ValueError, ImportError, NotImplementedError) as error:
        raise ArgumentError(" ".join(str(error).split())) from error
