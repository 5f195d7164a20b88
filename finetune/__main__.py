"""Command line interface ``python -m finetune <command> [options]``: data checks, evaluation, chat, export, ..."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from finetune.runtime import outcome
from finetune.runtime.processes import end_with_launcher
from finetune.utils.errors import UserError, silence_unactionable_warnings

# One line per command; its module is imported only when it runs, so that the list appears at once.
COMMANDS = {
    "tiny": "write a complete tiny checkpoint folder in the official layout",
    "demo-data": "write a small image dataset with known answers",
    "demo": "train, save, verify and evaluate a tiny model: a test of the installation",
    "check": "validate the records of a data file as training will, and report every problem",
    "plan": "estimate GPU memory by method, ZeRO stage and batch size, before training",
    "selfcheck": "load a checkpoint and test it: prompt, caption, loss; run it first with real weights",
    "evaluate": "generate answers to the questions of a data file and score them",
    "guicourse": "convert the GUICourse data sets, and compute their published scores of predictions",
    "chat": "chat with a model in the terminal or browser, with and without its adapters",
    "restore-template": "restore the inference chat template of a 2.5 checkpoint trained by the old scripts",
    "consolidate": "consolidate the ZeRO shards of a checkpoint into a model or an adapter",
    "export": "merge adapters into their base: a complete, verified, sharded model folder",
    "verify": "load a saved adapter or model and compare its logits with those of the trained model",
}


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items()]
    head = "usage: python -m finetune <command> [options]\n\nTraining itself: sh finetune_lora.sh or sh finetune_ds.sh."
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


if __name__ == "__main__":
    outcome.leave(main())
