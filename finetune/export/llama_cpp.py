"""Runs the conversion scripts of a llama.cpp checkout, which turn a model folder into GGUF files."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.checkpoints.base_checkpoint import BaseCheckpoint
from finetune.families import FAMILIES
from finetune.families.family import Family
from finetune.utils.errors import UserError
from finetune.utils.json_objects import read_object

COMMIT = "0c1e570"
"""The commit of llama.cpp whose scripts were run (llama-cpp-python 0.3.36 ships it)."""
LANGUAGE, PROJECTOR = "language.gguf", "mmproj.gguf"
_CONVERT = "convert_hf_to_gguf.py"
_LEGACY = "tools/mtmd/legacy-models"
_SURGERY, _ENCODER = f"{_LEGACY}/minicpmv-surgery.py", f"{_LEGACY}/minicpmv-convert-image-encoder-to-gguf.py"
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_HALVES = ("0.5", "0.5", "0.5")
_LAST_LINES = 15


@dataclass(frozen=True, slots=True)
class Checkout:
    """A checkout of llama.cpp that can convert a family.

    Attributes:
        folder: the checkout, absolute.
        python: interpreter that runs its scripts.
        quantiser: its llama-quantize; None if nothing is quantised.
    """

    folder: Path
    python: str
    quantiser: Path | None


@dataclass(frozen=True, slots=True)
class Step:
    """A command of the conversion.

    Attributes:
        title: what it does, for messages.
        argv: the command.
        writes: the file that it must leave.
        answers: what is typed at its questions.
    """

    title: str
    argv: tuple[str, ...]
    writes: Path
    answers: str = ""


def check_family(base: BaseCheckpoint, *, trust_remote_code: bool) -> None:
    """Refuses what llama.cpp cannot take, and code files that must be run without having been allowed.

    Raises:
        UserError: the family has no converter, or its code files are missing or not to be run.
    """
    family = base.family
    if family.llama_cpp is None:
        able = ", ".join(each.title for each in FAMILIES if each.llama_cpp is not None)
        raise UserError(f"--format gguf: llama.cpp has no converter for {family.title}; it takes {able}")
    if family.llama_cpp.version is None:
        return
    if missing := [name for name in _code_files(base.config) if not (base.folder / name).is_file()]:
        raise UserError(
            f"--format gguf: llama.cpp's first step loads {family.title} by the code files of its checkpoint, and "
            f"{base.folder} has no {', '.join(missing)}: download the whole checkpoint"
        )
    if not trust_remote_code:
        raise UserError(
            f"--format gguf: llama.cpp's first step runs the code files of {base.folder}: read them and add "
            "--trust_remote_code true"
        )


def find_checkout(folder: str | None, family: Family, architecture: str, *, python: str, quantize: bool) -> Checkout:
    """The checkout, with everything that the conversion of a family needs.

    Args:
        folder: value of --llama_cpp.
        family: the generation.
        architecture: of config.json, by which the converter knows a model that it reads as it is.
        python: interpreter for its scripts.
        quantize: whether llama-quantize is needed.

    Raises:
        UserError: no checkout, or one that lacks something.
    """
    get = (
        f"git clone https://github.com/ggml-org/llama.cpp && git -C llama.cpp checkout {COMMIT}, "
        "then --llama_cpp llama.cpp"
    )
    if folder is None:
        raise UserError(f"--format gguf needs --llama_cpp DIR, a checkout of llama.cpp: {get}")
    place = Path(folder).expanduser().absolute()
    whole = family.llama_cpp is not None and family.llama_cpp.version is None
    scripts = [_CONVERT] if whole else [_CONVERT, _SURGERY, _ENCODER]
    if missing := [name for name in scripts if not (place / name).is_file()]:
        raise UserError(f"--llama_cpp {folder}: no {' and no '.join(missing)} there; get the tested commit: {get}")
    if whole and not _knows(place, architecture):
        raise UserError(
            f"--llama_cpp {folder}: its converter does not know {architecture} of {family.title}; update the checkout"
        )
    if (found := shutil.which(Path(python).expanduser())) is None:
        raise UserError(f"--llama_cpp_python {python}: no such program; give the interpreter of an environment")
    # The scripts run in the checkout, where a relative path would lead elsewhere.
    return Checkout(place, os.path.abspath(found), _quantiser(place) if quantize else None)


def steps(
    checkout: Checkout, family: Family, model: Path, out: Path, *, dtype: str = "auto", quantize: str | None = None
) -> list[Step]:
    """The commands that convert a model folder, in order.

    Args:
        checkout: from ``find_checkout``.
        family: the generation.
        model: the folder; commands write into it.
        out: folder of the GGUF files.
        dtype: "float32", "float16", "bfloat16", or "auto" for what the converter chooses.
        quantize: a type of llama-quantize, such as Q4_K_M.
    """
    script = [checkout.python, str(checkout.folder / _CONVERT)]
    typed = ["--outtype", _TYPES[dtype]] if dtype in _TYPES else []
    language, projector = out / LANGUAGE, out / PROJECTOR
    version = None if family.llama_cpp is None else family.llama_cpp.version
    if version is None:
        # Without the flag a file is made that cannot be loaded: config.json counts a layer that has no weights.
        plain = [*script, str(model), "--outfile", str(language), *typed, "--no-mtp"]
        visual = [*script, str(model), "--mmproj", "--outfile", str(projector), *typed]
        found = [Step("language model", tuple(plain), language), Step("vision tower", tuple(visual), projector)]
    else:
        found = _taken_apart(checkout, version, model, out, typed)
    if quantize is not None:
        assert checkout.quantiser is not None  # ``find_checkout`` was asked for it
        small = out / f"language-{quantize}.gguf"
        argv = (str(checkout.quantiser), str(language), str(small), quantize)
        found.append(Step(f"quantising to {quantize}", argv, small))
    return found


def _taken_apart(checkout: Checkout, version: int, model: Path, out: Path, typed: list[str]) -> list[Step]:
    """The three steps of the generations whose tensors are sorted into parts first."""
    python, tools = checkout.python, checkout.folder
    tensors = model / "minicpmv.projector"
    encoder = [python, str(tools / _ENCODER), "-m", str(model), "--minicpmv-projector", str(tensors)]
    encoder += ["--output-dir", str(out), "--image-mean", *_HALVES, "--image-std", *_HALVES]
    encoder += ["--minicpmv_version", str(version), *(["--use-f32"] if "f32" in typed else [])]
    named = out / f"mmproj-model-{'f32' if 'f32' in typed else 'f16'}.gguf"
    language = [python, str(tools / _CONVERT), str(model / "model"), "--outfile", str(out / LANGUAGE), *typed]
    return [
        Step("taking the model apart", (python, str(tools / _SURGERY), "-m", str(model)), tensors),
        Step("vision tower", tuple(encoder), named),
        # It asks whether the tokenizer's code may run, which the user has said.
        Step("language model", tuple(language), out / LANGUAGE, answers="y\n" * 16),
    ]


def conversion_size(shapes: Mapping[str, Sequence[int]], family: Family, *, dtype: str, quantize: bool) -> int:
    """Bytes that the conversion writes beside the merged model.

    Args:
        shapes: of its tensors, by name.
        family: the generation.
        dtype: as of ``steps``.
        quantize: whether a quantised file is written too.
    """
    total = apart = language = 0
    for name, shape in shapes.items():
        count, of_language = math.prod(shape), name.startswith(tuple(family.parts["llm"]))
        total += count
        language += count if of_language else 0
        # The first script writes the language model in bfloat16, the rest in float32.
        apart += count * (2 if of_language else 4)
    taken_apart = family.llama_cpp is not None and family.llama_cpp.version is not None
    # llama-quantize writes at most 8 bits and a scale a value in the types that are worth it.
    return (apart if taken_apart else 0) + total * (4 if dtype == "float32" else 2) + (2 * language if quantize else 0)


def run_steps(checkout: Checkout, found: Sequence[Step], log: Path, done_with: Callable[[str], None]) -> None:
    """Runs the commands, without network; their output goes into a log file, the title of each to ``done_with``.

    Raises:
        UserError: one fails or leaves no file, with its last lines.
    """
    # The image encoder's script needs the checkout's gguf, which the other one finds by itself.
    paths = [str(checkout.folder / "gguf-py"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for step in found:
        done = subprocess.run(
            step.argv,
            cwd=checkout.folder,
            env=environment,
            input=step.answers,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(step.argv)}\n{done.stdout}\n")
        if done.returncode or not step.writes.is_file():
            why = f"ended with status {done.returncode}" if done.returncode else f"left no {step.writes.name}"
            last = "\n".join(done.stdout.strip().splitlines()[-_LAST_LINES:])
            raise UserError(
                f"llama.cpp, {step.title}: {' '.join(step.argv)} {why}. Tested are commit {COMMIT} and, for 2.5 to 4.5 "
                "with the code files of the base, transformers 4.57.6 (o 2.6: 4.44.2): --llama_cpp_python names an "
                f"interpreter that has it. The last lines: {last}"
            )
        done_with(step.title)
    # The image encoder's script names its file itself.
    for path in {step.writes for step in found if step.writes.name.startswith("mmproj-model-")}:
        path.rename(path.with_name(PROJECTOR))


def prepare_copy(model: Path) -> list[str]:
    """Makes a copied folder one that llama.cpp's scripts can convert; returns notes on what was changed.

    The published resampler of 2.6 takes ``List`` out of a star import, which torch 2.13 and later no longer feeds. 2.5
    pads with "!", which its tokenizer then takes for a special token: the converter does not know such a tokenizer.
    """
    return [*_import_list(model / "resampler.py"), *_pad_with_eos(model)]


def _import_list(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not re.search(r"\bList\[", text) or re.search(r"^from typing import .*\bList\b", text, re.M):
        return []
    path.write_text(f"from typing import List  # added by the export: torch 2.13\n{text}", encoding="utf-8")
    return ["resampler.py: 'from typing import List' was added to the copy that llama.cpp's script runs"]


def _pad_with_eos(model: Path) -> list[str]:
    """Replaces a padding token that is a word of the vocabulary; nothing is padded in a server."""
    path = model / "tokenizer_config.json"
    config = read_object(path) if path.is_file() else {}
    added = {entry["content"] for entry in config.get("added_tokens_decoder", {}).values()}
    pad, eos = config.get("pad_token"), config.get("eos_token")
    if not isinstance(pad, str) or not added or pad in added or eos is None:
        return []
    for each in (path, model / "special_tokens_map.json"):
        if each.is_file():
            text = json.dumps({**read_object(each), "pad_token": eos}, indent=2, ensure_ascii=False)
            each.write_text(f"{text}\n", encoding="utf-8")
    return [f"tokenizer_config.json: pad_token {pad!r} was replaced in the copy, so that it is no special token"]


def _code_files(config: Mapping[str, Any]) -> list[str]:
    """The code files that config.json names."""
    named = (config.get("auto_map") or {}).values()
    return sorted({f"{str(value).partition('.')[0]}.py" for value in named}) or ["modeling_minicpmv.py"]


def _knows(checkout: Path, architecture: str) -> bool:
    """Whether the converter's sources name an architecture."""
    files = [checkout / _CONVERT, *sorted((checkout / "conversion").glob("*.py"))]
    return any(architecture in path.read_text(encoding="utf-8", errors="replace") for path in files)


def _quantiser(checkout: Path) -> Path:
    places = [checkout / "build" / "bin", checkout / "build" / "bin" / "Release", checkout]
    for place in places:
        if (found := shutil.which("llama-quantize", path=str(place))) is not None:
            return Path(found)
    if (anywhere := shutil.which("llama-quantize")) is not None:
        return Path(anywhere)
    raise UserError(
        f"--quantize: no llama-quantize in {checkout / 'build' / 'bin'} or on the PATH: build it there with "
        "cmake -B build && cmake --build build --target llama-quantize"
    )
