"""Argument parser of the commands other than train: strict values, errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from finetune.arguments.ranges import check_ranges
from finetune.utils.errors import ArgumentError


class CommandParser(argparse.ArgumentParser):
    """Refuses abbreviated options, empty values and numbers out of range.

    Args:
        **options: as of ``argparse.ArgumentParser``.

    Raises:
        ArgumentError: by ``parse_args``, for anything that argparse would end the process for.
    """

    def __init__(self, **options: Any) -> None:
        self.declared: list[argparse.Action] = []
        super().__init__(**{"allow_abbrev": False, **options})

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Also keeps the option in ``declared``, for shell completion."""
        self.declared.append(super().add_argument(*names, **options))
        return self.declared[-1]

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage and exiting."""
        raise ArgumentError(f"{message}; {self.prog} --help lists the options")

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Also validates the values."""
        words = list(sys.argv[1:] if args is None else args)
        for before, word in zip(["", *words], words, strict=False):
            name, equals, value = word.partition("=")
            if not word or (name.startswith("--") and equals and not value):
                raise ArgumentError(f"{(name or before) or 'an argument'} has an empty value: give one, or remove it")
        values, rest = super().parse_known_args(args, namespace or argparse.Namespace())
        check_ranges(vars(values))
        return values, rest
