"""``python -m finetune <command> [options]``: training and everything around it."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from finetune.runtime import outcome
from finetune.runtime.processes import end_with_launcher
from finetune.utils.errors import UserError, silence_unactionable_warnings

# One line per command; its module is imported only when it runs, so that the list appears at once.
COMMANDS = {
    "train": "train, on all GPUs here or on two CPU processes: flags, or a YAML file of ours or of LLaMA-Factory",
    "init": "write a folder to start from: train.yaml, data, and a README with the commands",
    "tiny": "write a complete tiny checkpoint folder in the official layout",
    "demo-data": "write a small image dataset with known answers",
    "demo": "train, save, verify and question a tiny model: proof that the installation works",
    "doctor": "is everything here that training needs? what is wrong comes with the line that mends it",
    "check": "look at the records of a data file as training will, and report every problem",
    "plan": "what fits on the card: memory by method, ZeRO stage and batch, before anything is trained",
    "selfcheck": "load a checkpoint and try it out: prompt, caption, loss; the first thing to do with real weights",
    "evaluate": "ask a model the questions of a data file and score its answers",
    "guicourse": "convert the GUICourse data sets, and score predictions as they are scored",
    "chat": "talk to a model in the terminal, with and without its adapters",
    "restore-template": "give a 2.5 checkpoint of the old scripts its inference chat template back",
    "consolidate": "make a model or an adapter of the parts that an interrupted run with ZeRO left",
    "export": "merge adapters into their base: a complete model folder, checked, in shards",
    "verify": "load a saved adapter or model in this process and compare it with its training",
}


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
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at exit goes nowhere
        status = 128 + signal.SIGPIPE
    outcome.exit_process(status)


if __name__ == "__main__":
    console_script()
