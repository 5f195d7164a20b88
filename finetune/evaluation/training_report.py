"""report.html of a training run: setup, curves, generated answers, and commands for the result."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments

from finetune.evaluation.evaluation_report import pictures_of, words_of
from finetune.evaluation.generation_evaluator import GeneratedAnswers
from finetune.evaluation.plots import metric_names, points
from finetune.pages.charts import Curves, curves
from finetune.pages.html_page import count, render
from finetune.pages.thumbnails import jpeg, weight, within

_ROOM = 3_000_000
"""Byte budget for the images of all answers."""
_TEXT_ROOM = 4_000_000
"""Byte budget for the texts of all answers."""
_ANSWERS = 40
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Description of a run for its report.

    Attributes:
        base: name of the base checkpoint.
        family: published name of the model family.
        adapter: whether the result is an adapter or a full model.
        parts: name, mode, parameters, trained parameters and learning rate of each part.
        flags: name, value and origin of each flag that is not at its default.
        max_pixels: maximum pixels of an image to decode.
    """

    base: str
    family: str
    adapter: bool
    parts: Sequence[tuple[str, str, int, int, float | None]]
    flags: Sequence[tuple[str, Any, str]]
    max_pixels: int


def build_run(
    facts: RunFacts, args: TrainingArguments, state: TrainerState, answered: Sequence[GeneratedAnswers], seconds: float
) -> str:
    """The page as HTML.

    Args:
        facts: description of the run.
        args: training arguments.
        state: trainer state with its log history.
        answered: the questions of --eval_generate.
        seconds: training time.

    Raises:
        DataError: an image of a question can no longer be read.
    """
    folder, history = Path(args.output_dir or "output").absolute(), state.log_history
    result = [(word, found[-1][1]) for key, word in _LOSSES if (found := points(history, key))]
    latest = {name: entry[name] for entry in history for name in metric_names(entry)}
    result += [(words_of(name.removeprefix("eval_")), value) for name, value in latest.items()]
    return render(
        "training",
        folder=folder,
        facts=facts,
        done=state.global_step,
        wanted=state.max_steps,
        epochs=state.epoch,
        time=_time(seconds),
        results=[(word, f"{value:.4g}") for word, value in result],
        charts=_charts(history),
        no_part_norms=_no_part_norms(facts, history),
        part_words=part_words,
        answers=(cards := _answers([each for each in answered if each.answers][:_ANSWERS], facts.max_pixels)),
        text_room=_TEXT_ROOM // max(sum(len(each["answers"]) + 2 for each in cards), 1),
        total=sum(part[2] for part in facts.parts),
        trained=sum(part[3] for part in facts.parts),
        environment=_environment(args),
        commands=_commands(folder, facts.adapter),
    )


_LOSSES = (("loss", "training loss"), ("eval_loss", "evaluation loss"))
_PARTS = {"vision": "vision tower", "llm": "language model", "audio": "audio tower", "grad_norm": "all trained parts"}


def part_words(name: str) -> str:
    """A part of the model in words."""
    return _PARTS.get(name, name)


def _part_norms(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of the gradient norms of single parts."""
    return list(dict.fromkeys(key for entry in history for key in entry if key.startswith("grad_norm_")))


def _no_part_norms(facts: RunFacts, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether several parts were trained and only the norm of all together could be measured."""
    trained = sum(part[3] > 0 for part in facts.parts)
    return trained > 1 and bool(points(history, "grad_norm")) and not _part_norms(history)


def _charts(history: Sequence[Mapping[str, Any]]) -> list[Curves]:
    """Charts of all logged values."""
    metrics = list(dict.fromkeys(name for entry in history for name in metric_names(entry)))
    norms = ["grad_norm", *_part_norms(history)]
    noisy: list[tuple[str, Mapping[str, str]]] = [
        ("Loss", {"loss": "training", "eval_loss": "evaluation"}),
        ("Gradient norm before clipping", {name: part_words(name.removeprefix("grad_norm_")) for name in norms}),
    ]
    sides = {"training": "", "evaluation": "eval_"}

    def of_pairs(*names: str) -> dict[str, str]:
        words = [f"{name.partition('/')[2]}, " if len(names) > 1 else "" for name in names]
        named = list(zip(names, words, strict=True))
        return {f"{key}{name}": f"{word}{side}" for side, key in sides.items() for name, word in named}

    plain: list[tuple[str, Mapping[str, str]]] = [
        ("Share of pairs whose chosen answer is preferred", of_pairs("rewards/accuracies")),
        ("Margin between the rewards of both answers", of_pairs("rewards/margins")),
        ("Rewards of both answers", of_pairs("rewards/chosen", "rewards/rejected")),
        ("Trained tokens of the answers", of_pairs("length/chosen", "length/rejected")),
        ("Answers to evaluation questions", {name: words_of(name.removeprefix("eval_")) for name in metrics}),
        ("Learning rate", {"learning_rate": "of the first part; those of the parts are below"}),
        ("Tokens per second", {"tokens_per_second": "tokens"}),
        ("Share of the peak FLOP/s of the GPUs (MFU)", {"mfu": "MFU"}),
        ("TFLOP/s", {"tflops_per_second": "TFLOP/s"}),
        ("Fraction of time waiting for data", {"data_wait": "fraction"}),
        ("Peak memory per GPU in GiB (maximum)", {"peak_memory_gb": "GiB"}),
    ]
    made = [
        curves(title, [(name, points(history, key)) for key, name in keys.items()], noisy=kind is noisy)
        for kind in (noisy, plain)
        for title, keys in kind
    ]
    return [chart for chart in made if chart is not None]


def _answers(answered: Sequence[GeneratedAnswers], max_pixels: int) -> list[dict[str, Any]]:
    room, shown = _ROOM // max(len(answered), 1), []
    for prompt, reference, answers in answered:
        sources = list(pictures_of(prompt, max_pixels))
        shown.append(
            {
                "source": str(prompt.source),
                "question": prompt.messages[-1].text.strip(),
                "reference": reference,
                "answers": [
                    (f"at step {step:,}" if step else "before training", text) for step, text in answers.items()
                ],
                "changed": len(set(answers.values())) > 1,
                "pictures": within(
                    room,
                    lambda detail, given=sources: [jpeg(each, detail.side, detail.quality) for each in given],
                    weight,
                ),
            }
        )
    return shown


def _environment(args: TrainingArguments) -> list[tuple[str, str]]:
    found = [("Python", platform.python_version()), *((name, version(name)) for name in _PACKAGES)]
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    devices = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "CPU"
    return [("Processes", f"{args.world_size}"), ("Devices of the first machine", devices), *found]


def _time(seconds: float) -> str:
    """A duration as text.

    >>> _time(45), _time(3700)
    ('45 s', '1 h 2 min')
    """
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else count(minutes, "minute")


def _commands(folder: Path, adapter: bool) -> list[tuple[str, str]]:
    """Commands and code to use the result."""
    path, merged = shlex.quote(str(folder)), shlex.quote(f"{folder}-merged")
    run = "python -m finetune"
    kind, auto = ("peft", "AutoPeftModel") if adapter else ("transformers", "AutoModel")
    load = [
        "import finetune.models  # registers the model class; no remote code is run",
        f"from {kind} import {auto}",
        "",
        f'model = {auto}.from_pretrained({str(folder)!r}, device_map="auto").eval()',
    ]
    export = f"{run} export --adapter_name_or_path {path} --export_dir {merged}"
    served = merged if adapter else path
    return [
        ("Load it in Python", "\n".join(load)),
        ("Chat with it", f"{run} chat {'--adapter' if adapter else '--model'} {path}"),
        ("Evaluate it", f"{run} evaluate --model {path} --data DATA.json" + (" --compare base" if adapter else "")),
        *([("Merge it into its base", export)] if adapter else []),
        ("Serve it with vLLM", f"vllm serve {served} --trust-remote-code"),
    ]
