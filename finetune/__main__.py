"""``python -m finetune <command> [options]``: training and everything around it."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from finetune.commands.command_list import COMMANDS
from finetune.runtime import outcome
from finetune.runtime.imports import collect_rarely, hide_optional_libraries
from finetune.runtime.processes import end_with_launcher
from finetune.utils.errors import UserError, silence_unactionable_warnings


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items()]
    head = (
        "usage: python -m finetune <command> [options]\n\nThe launchers finetune_lora.sh and finetune_ds.sh train too."
    )
    return "\n".join([head, "", "commands:", *lines, "", "python -m finetune <command> --help lists its options."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for an unknown command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Commands: {', '.join(COMMANDS)}."
        print(f"python -m finetune: unknown command {name!r}. {hint}", file=sys.stderr)
        return 2
    silence_unactionable_warnings()
    end_with_launcher()
    command = importlib.import_module(f"finetune.commands.{name.replace('-', '_')}")
    try:
        return command.main(rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def console_script() -> None:
    """Entry point of ``minicpmv-finetune``; ends quietly where its output goes to a ``head`` that has read enough."""
    collect_rarely()
    hide_optional_libraries()
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at exit goes nowhere
        status = 128 + signal.SIGPIPE
    outcome.exit_after_handlers(status)


if __name__ == "__main__":
    console_script()
