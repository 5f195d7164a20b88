"""``python -m finetune export --format gguf``: its flags, and the conversion to GGUF files with llama.cpp's scripts."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.utils.errors import UserError

if TYPE_CHECKING:
    from finetune.checkpoints.base_checkpoint import BaseCheckpoint
    from finetune.export.llama_cpp import Checkout
    from finetune.export.sharded_writer import WeightFiles

_FLAGS = ("llama_cpp", "llama_cpp_python", "quantize", "trust_remote_code")


def add_gguf_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that only --format gguf has."""
    group = parser.add_argument_group("--format gguf")
    group.add_argument("--llama_cpp", metavar="DIR", help="checkout of llama.cpp, which has the converters")
    group.add_argument("--llama_cpp_python", metavar="PYTHON", help="interpreter for its scripts (default: this one)")
    group.add_argument(
        "--quantize", metavar="TYPE", help="also quantise, e.g. Q4_K_M, by llama-quantize of the checkout"
    )
    group.add_argument(
        "--trust_remote_code",
        choices=["true", "false"],
        nargs="?",
        const="true",
        help="2.5 to 4.5: let llama.cpp's first step run the code files of the base",
    )


def find_gguf_checkout(given: argparse.Namespace, base: BaseCheckpoint) -> Checkout | None:
    """The checkout for --format gguf, before anything is written; None for other formats.

    Raises:
        UserError: a flag without effect, a family that llama.cpp cannot take, or a checkout that cannot be used.
    """
    if given.format != "gguf":
        if unused := [f"--{name}" for name in _FLAGS if getattr(given, name) is not None]:
            raise UserError(f"{', '.join(unused)}: no effect without --format gguf; remove it")
        return None
    from finetune.export.llama_cpp import check_family, find_checkout

    check_family(base, trust_remote_code=given.trust_remote_code == "true")
    return find_checkout(
        given.llama_cpp,
        base.family,
        (base.config.get("architectures") or [""])[0],
        python=given.llama_cpp_python or sys.executable,
        quantize=given.quantize is not None,
    )


def check_gguf_space(given: argparse.Namespace, base: BaseCheckpoint, files: WeightFiles, folder: Path) -> None:
    """Checks that the disk has space for the merged model and everything that its conversion writes.

    Raises:
        UserError: it has not.
    """
    from finetune.export.llama_cpp import conversion_size
    from finetune.export.sharded_writer import check_export_space

    shapes = {name: stored.shape for name, stored in files.weights.stored.items()}
    more = conversion_size(shapes, base.family, dtype=given.infer_dtype, quantize=given.quantize is not None)
    check_export_space(folder, files.total_size + more)


def convert_to_gguf(
    given: argparse.Namespace, base: BaseCheckpoint, checkout: Checkout, model: Path, folder: Path, out: Path
) -> None:
    """Converts a merged model folder, which is removed, and prints how the files are served.

    Args:
        given: parsed command line.
        base: the checkpoint, with the prompt settings of the result.
        checkout: from ``find_gguf_checkout``.
        model: the merged model, inside ``folder``.
        folder: the unfinished result.
        out: where it will be.
    """
    from finetune.export.llama_cpp import LANGUAGE, PROJECTOR, prepare_copy, run_steps, steps
    from finetune.export.prompt_files import MODELFILE, encoder_of, thinking_options, write_prompt_files

    for note in prepare_copy(model):
        print(f"note: {note}")
    found = steps(checkout, base.family, model, folder, dtype=given.infer_dtype, quantize=given.quantize)
    run_steps(checkout, found, folder / "conversion.log", lambda title: print(f"converted  {title}", flush=True))
    language = LANGUAGE if given.quantize is None else found[-1].writes.name
    encoder = encoder_of(base)
    write_prompt_files(folder, encoder, language=language, projector=PROJECTOR)
    shutil.rmtree(model)
    thinking = ["--chat-template-kwargs", '{"enable_thinking": false}'] if thinking_options(encoder) else []
    server = ["llama-server", "-m", str(out / language), "--mmproj", str(out / PROJECTOR), "--jinja", "-c", "4096"]
    print(f"serve with {shlex.join([*server, *thinking, '--port', '8000'])}")
    print(f"       or  ollama create {out.name} -f {shlex.quote(str(out / MODELFILE))}")
    if base.family.network is not None and base.family.network.positions != "grid":
        print("note: llama.cpp gives pictures other positions than training: what is served answers otherwise")
    if encoder.layout.image_ids:
        print("note: llama.cpp does not number images; prompt_example.md has the request that does")
