"""``python -m finetune completion bash``: prints completion of commands and options for bash, zsh or tcsh.

    source <(minicpmv-finetune completion bash)

in ~/.bashrc, or in ~/.zshrc with zsh, completes ``minicpmv-finetune``.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from finetune.arguments.flag_names import flag_types
from finetune.commands.command_list import COMMANDS
from finetune.commands.parser import CommandParser
from finetune.utils.errors import ArgumentError

_PROGRAM = "minicpmv-finetune"
# Words in the names of flags whose values are files or folders.
_PATHS = ("path", "dir", "root", "deepspeed", "adapter", "model", "data", "out")


def main(argv: list[str]) -> int:
    """Runs ``python -m finetune completion``.

    Raises:
        ArgumentError: the package that writes completions is not installed.
    """
    given = build_parser().parse_args(argv)
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ArgumentError("completion needs shtab: pip install -e '.[completion]'") from error
    print(shtab.complete(_all_commands(shtab.FILE), given.shell))
    return 0


def _all_commands(files: object) -> argparse.ArgumentParser:
    """One parser with every command; what takes a file or folder gets ``files`` as its completion."""
    root = argparse.ArgumentParser(prog=_PROGRAM)
    commands = root.add_subparsers()
    for name, summary in COMMANDS.items():
        own: CommandParser = importlib.import_module(f"finetune.commands.{name.replace('-', '_')}").build_parser()
        made = commands.add_parser(name, help=summary, parents=[own], add_help=False, conflict_handler="resolve")
        actions = list(own.declared)
        if name == "train":  # the flags of training, which train hands on
            actions.append(made.add_argument("config", nargs="?", type=Path, help="a YAML file of flags"))
            actions += [made.add_argument(f"--{flag}") for flag in flag_types()]
        for action in actions:
            if action.choices is None and (action.type is Path or any(word in action.dest for word in _PATHS)):
                action.complete = files  # pyright: ignore[reportAttributeAccessIssue]
    return root


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        prog="python -m finetune completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser
