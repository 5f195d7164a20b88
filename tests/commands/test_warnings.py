"""Nothing that a run or a command calls is deprecated, and no file is left to the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from transformers.utils.logging import get_logger

from finetune.__main__ import main as command

ROOT = Path(__file__).resolve().parents[2]
OURS = ("finetune", "dataset", "trainer", "chat", "launched")
KINDS = (FutureWarning, DeprecationWarning, PendingDeprecationWarning, ResourceWarning)
# Through these, one function calls another: they are nobody's caller.
BETWEEN = ("warnings", "logging", "functools", "contextlib", "torch.nn.modules.module", "torch.utils._contextlib")
FLAGS = (
    "--max_steps 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --save_strategy steps "
    "--save_steps 1 --do_eval true --use_cpu true --disable_tqdm true --max_slice_nums 1 --gradient_checkpointing true "
    "--report_to tensorboard --verify_adapter off"
)
LORA = "--use_lora true --lora_r 4 --tune_vision false --tune_llm false"


def caller(frame: FrameType | None) -> str:
    """The module that called the package that warns; of a warning of ours, ours."""
    names = []
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and not any(name == other or name.startswith(f"{other}.") for other in BETWEEN):
            names.append(name)
        frame = frame.f_back
    package = names[0].partition(".")[0]
    if package in OURS:
        return names[0]
    return next((name for name in names if name.partition(".")[0] != package), "")


class Notes(logging.Handler):
    """Notes what transformers says about deprecated arguments."""

    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        name = caller(sys._getframe(1))
        if "deprecated" in record.getMessage() and name.partition(".")[0] in OURS:
            self.found.append(f"{name}: {record.getMessage()}")


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Collects the deprecations that our calls bring about, and all files that nobody closed."""
    found: list[str] = []

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        name = caller(sys._getframe(1))
        ours = category is ResourceWarning or name.partition(".")[0] in OURS
        if issubclass(category, KINDS) and ours:
            found.append(f"{name}: {category.__name__}: {message}")

    notes, logger = Notes(found), get_logger("transformers")
    logging.Logger.warning_once.cache_clear()  # pyright: ignore[reportAttributeAccessIssue]  # said in an earlier test
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        logger.addHandler(notes)
        try:
            yield found
            gc.collect()
        finally:
            logger.removeHandler(notes)


def launched(*words: object) -> int:
    """``finetune.py`` in this process."""
    spec = importlib.util.spec_from_file_location("launched", ROOT / "finetune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(word) for word in words])


@pytest.mark.parametrize(("family", "method"), [("llama3_v2_5", LORA), ("v4_6", "--use_lora false")])
def test_a_run_and_what_is_done_with_its_result(
    tiny, demo_data, tmp_path, monkeypatch, one_thread, family: str, method: str
) -> None:
    base, out, data = tiny(family), tmp_path / "out", demo_data / "eval.json"
    plain = ("--device", "cpu", "--max_new_tokens", "2")
    commands: list[Callable[[], int]] = [
        lambda: launched(
            "--model_name_or_path", base, "--data_path", demo_data / "train.json", "--eval_data_path", data,
            "--output_dir", out, *FLAGS.split(), *method.split(),
        ),
        lambda: command(["verify", str(out), "--device", "cpu"]),
        lambda: command(["evaluate", "--model", str(out), "--data", str(data), "--out", str(tmp_path / "ev"), *plain]),
        lambda: command(["chat", "--adapter" if "true" in method else "--model", str(out), *plain]),
    ]  # fmt: skip
    if method is LORA:
        export = ("--adapter_name_or_path", str(out), "--export_dir", str(tmp_path / "whole"))
        commands.append(lambda: command(["export", *export]))
    with watched() as found:
        for one in commands:
            monkeypatch.setattr(sys, "stdin", io.StringIO("Which colour?\n"))
            assert one() == 0
    assert found == []


def made(name: str, source: str, **known: Any) -> dict[str, Any]:
    """A module with that name."""
    module = {"__name__": name, **known}
    exec(source, module)
    return module


@pytest.mark.parametrize("how", ["warnings.warn('deprecated', FutureWarning)", "logger.warning_once('deprecated')"])
def test_what_counts_as_our_call(how: str) -> None:
    logger = get_logger("transformers")
    library = made("transformers.old", f"def old(): {how}", warnings=warnings, logger=logger)
    inside = made("transformers.new", "def new(): old()", old=library["old"])
    for between, counts in (("finetune.made", True), ("transformers.other", True), ("peft.other", False)):
        middle = made(between, "def call(): old()", old=inside["new"])
        ours = made("finetune.caller", "def call(): other()", other=middle["call"])
        with watched() as found:
            ours["call"]()
        assert len(found) == counts, between


def test_an_open_file_counts(tmp_path) -> None:
    (tmp_path / "kept").write_text("x")
    with watched() as found:
        made("finetune.made", "path.open()", path=tmp_path / "kept")
    assert len(found) == 1
    assert "unclosed file" in found[0]
