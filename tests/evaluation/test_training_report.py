"""report.html of a training: what was logged and answered, and commands that work with the paths they name."""

from __future__ import annotations

import logging
import math
import re
import shlex

import pytest
from page_reading import assert_safe
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.commands import chat, evaluate, export
from finetune.evaluation import progress_files
from finetune.evaluation.generation_evaluator import GeneratedAnswers
from finetune.evaluation.progress_files import ProgressCallback
from finetune.evaluation.training_report import RunFacts, build_run
from finetune.pages.html_page import PageError, render
from finetune.sample import Media, Message, Sample, Source, Text

EVIL = "<script>alert('x')</script>\x1b[31m&\"</style>"


def facts(**changes) -> RunFacts:
    parts = [("vision", "frozen", 100, 0, None), ("llm", f"LoRA {EVIL}", 300, 100, 1e-4)]
    given = {"base": EVIL, "family": "MiniCPM-V 4.5", "adapter": True, "parts": parts, "max_pixels": 10**7}
    return RunFacts(
        **{**given, "flags": [("learning_rate", 1e-4, "command line"), ("data_path", EVIL, EVIL)], **changes}
    )


def state_of(history: list[dict], done: int = 20, wanted: int = 20) -> TrainerState:
    state = TrainerState(global_step=done, max_steps=wanted, epoch=1.5)
    state.log_history = history
    return state


def answered(*answers: dict[int, str]) -> list[GeneratedAnswers]:
    parts = (Media("image", Image.new("RGB", (64, 48), "red")), Text(EVIL))
    prompt = Sample(id="a", source=Source(EVIL, 0, "a"), messages=(Message("user", parts),))
    return [GeneratedAnswers(prompt, "red", each) for each in answers]


def page(history: list[dict], tmp_path, answers=(), **changes):
    name = changes.pop("name", f"out {EVIL.replace('/', '')}")
    args = TrainingArguments(output_dir=str(tmp_path / name), use_cpu=True)
    text = build_run(facts(**changes), args, state_of(history), answers, 3700.0)
    return text, assert_safe(text)


def test_everything_that_was_logged_is_drawn(tmp_path):
    keys = ("loss", "learning_rate", "grad_norm", "grad_norm_llm", "tokens_per_second", "mfu", "data_wait")
    history = [{"step": step, **dict.fromkeys((*keys, "peak_memory_gb"), 1.0 + step)} for step in range(1, 21)]
    history += [{"step": 20, "eval_loss": 0.5, "eval_cer": 0.25, "eval_runtime": 3.0}]
    text, seen = page(history, tmp_path)
    titles = ("Loss", "Gradient norm", "Learning rate", "Tokens per second", "Peak memory", "waiting for data", "MFU")
    assert [title for title in titles if title not in seen.text] == []
    assert text.count('class="chart"') == 8
    assert "Character error rate" in seen.text
    assert "eval_" not in seen.text
    assert "language model 21" in seen.text
    assert "all trained parts 21" in seen.text
    assert "1 h 2 min" in seen.text
    assert "25 %" in seen.text, "of the parameters"


def test_figures_of_pairs_have_charts_of_their_own(tmp_path):
    names = ("accuracies", "margins", "chosen", "rejected")
    rewards = {f"{side}rewards/{name}": 0.5 for side in ("", "eval_") for name in names}
    text, seen = page([{"step": 1, "loss": 0.7, "length/chosen": 3.0, **rewards}], tmp_path)
    assert text.count('class="chart"') == 5
    assert "Share of pairs whose chosen answer is preferred" in seen.text
    assert "training 0.5, evaluation 0.5 at step 1" in text
    assert "chosen, training 0.5, rejected, training 0.5" in text


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("measured", [True, False])
def test_norms_that_could_not_be_measured_are_missing_in_words(both, measured, tmp_path):
    """Of one trained part there is nothing to tell: its norm is the total."""
    parts = [("vision", "full", 100, 100 * both, 1e-4), ("llm", "full", 300, 100, 1e-4)]
    history = [{"step": 1, "loss": 1.0, "grad_norm": 2.0, **({"grad_norm_llm": 1.0} if measured else {})}]
    _, seen = page(history, tmp_path, parts=parts)
    assert ("could not be measured part by part" in seen.text) == (both and not measured)


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"step": 1, "train_runtime": 3.0}],
        [{"step": 1, "loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.0}],
        [{"step": 1, "loss": 0.0}, {"step": 2, "loss": -1.0}, {"step": 2, "eval_loss": math.inf}],
        [{"step": step, "loss": 10.0 ** (step % 40 - 20)} for step in range(3000)],
    ],
)
def test_any_log_makes_a_page_of_bounded_size(history, tmp_path):
    text, seen = page(history, tmp_path)
    assert "nan" not in text.lower().replace("finance", "")
    assert len(text) < 120_000
    for points in re.findall(r'points="([^"]*)"', text):
        for point in points.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 400
            assert 0 <= y <= 200


def test_answers_before_and_after(tmp_path):
    text, seen = page([], tmp_path, answered({0: EVIL, 20: "red"}, {0: "red", 20: "red"}))
    assert len(seen.of("img")) == 2
    assert seen.text.count("Answer before training") == seen.text.count("Answer at step 20") == 2
    assert seen.text.count("changed") == 1
    assert "--eval_on_start" not in seen.text
    assert "--eval_on_start" in page([], tmp_path, answered({20: "red"}))[1].text


def test_long_answers_are_folded_and_huge_ones_counted(tmp_path):
    text, seen = page([], tmp_path, answered({0: "word " * 1000, 20: "line " * 2_000_000}))
    assert "Show all: 4,000 more characters here" in seen.text
    assert re.search(
        r"Show all: [\d,]+ more characters here, and [\d,]+ characters that are not on this page", seen.text
    )
    assert seen.text.count("word ") == 1000
    assert len(text) < 5_000_000


@pytest.mark.parametrize("adapter", [True, False])
def test_commands_are_taken_as_they_stand(adapter, tmp_path):
    """Also from a folder whose name a shell would take apart."""
    name = "a b'c"
    _, seen = page([], tmp_path, adapter=adapter, name=name)
    lines = [line for line in seen.text.splitlines() if line.startswith("python -m finetune")]
    commands = {shlex.split(line)[3]: shlex.split(line)[4:] for line in lines}
    assert set(commands) == {"chat", "evaluate", *(["export"] if adapter else [])}
    parsers = {"chat": chat.build_parser, "evaluate": evaluate.build_parser, "export": export.build_parser}
    for command, words in commands.items():
        given = vars(parsers[command]().parse_args(words))
        assert str(tmp_path / name) in [each[0] if isinstance(each, list) and each else each for each in given.values()]
    (served,) = [shlex.split(line) for line in seen.text.splitlines() if line.startswith("vllm serve")]
    assert served[2] == str(tmp_path / name) + ("-merged" if adapter else "")
    (loading,) = [line for line in seen.text.splitlines() if line.startswith("model = ")]
    assert repr(str(tmp_path / name)) in loading


@pytest.mark.parametrize("error", [OSError("disk full"), PageError("no page")])
def test_a_page_that_cannot_be_written_ends_nothing(error, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise error

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    callback = ProgressCallback(facts())
    callback.on_save(args, state_of([{"step": 1, "loss": 1.0}]), TrainerControl())
    assert_safe((tmp_path / "report.html").read_text())
    monkeypatch.setattr(progress_files, "build_run", refuse)
    with caplog.at_level(logging.WARNING):
        callback.on_save(args, state_of([{"step": 1, "loss": 1.0}]), TrainerControl())
    assert "report.html cannot be written, training continues" in caplog.text
    assert not list(tmp_path.glob(".*"))


def test_what_a_template_cannot_show_is_an_error_of_ours():
    with pytest.raises(PageError, match="cannot be rendered"):
        render("training")
