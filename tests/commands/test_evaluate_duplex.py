"""``python -m finetune evaluate`` on full-duplex records: scores, seconds, and flags that have no effect."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sounds import write_wav

from finetune.commands.evaluate import main
from finetune.evaluation import duplex_results
from finetune.evaluation.duplex_results import RecordResult
from finetune.utils.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_wav(tmp_path / "a.wav", 2)
    user = [{"audio": "a.wav", "start": 0}]
    records = [{"user": user, "assistant": [{"text": "Yes.", "start": 1.4}]}, {"user": user, "assistant": []}]
    path = tmp_path / "timelines.json"
    path.write_text(json.dumps([{"id": str(number), "duplex": each} for number, each in enumerate(records)]))
    return path


def test_scores_and_seconds(tiny: Callable[[str], Path], data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["--model", str(tiny("o4_5")), "--data", str(data), "--out", str(out)]) == 0
    scores = json.loads((out / "metrics.json").read_text())["scores"]
    assert {"decision_accuracy", "start_margin", "listen_accuracy", "turn_end_accuracy", "turns_begun", "cer"} <= set(
        scores
    )
    assert 0 <= scores["decision_accuracy"] <= 1
    first, second = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
    assert [each["reference"] for each in first["units"]] == [None, "Yes."]
    assert [each["reference"] for each in second["units"]] == [None, None]
    assert first["prediction"] == "".join(each["text"] for each in first["units"])
    assert "decision_accuracy" in capsys.readouterr().out


def test_the_page_shows_the_seconds(tiny: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--model", str(tiny("o4_5")), "--data", str(data), "--out", str(out), "--report_rows", "1"]
    assert main(flags) == 0
    page = (out / "report.html").read_text()
    assert "2 full-duplex records of timelines.json" in page
    assert "The 1 worst records" in page
    assert page.count("<article") == 1
    assert "The model, playing freely" in page
    assert "decision accuracy" in page
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["prompt"], metrics["records"]) == ("native", 2)


def test_an_interrupted_evaluation_goes_on(
    tiny: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--model", str(tiny("o4_5")), "--data", str(data), "--batch_size", "1", "--out"]
    assert main([*flags, str(whole)]) == 0
    real, played = duplex_results.play, []

    def play_once(*given: Any, **options: Any) -> Any:
        if played:
            raise KeyboardInterrupt
        played.append(1)
        return real(*given, **options)

    monkeypatch.setattr(duplex_results, "play", play_once)
    with pytest.raises(KeyboardInterrupt):
        main([*flags, str(cut)])
    assert len((cut / "predictions.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr(duplex_results, "play", real)
    assert main([*flags, str(cut)]) == 0
    for name in ("predictions.jsonl", "metrics.json"):
        assert (cut / name).read_text() == (whole / name).read_text()
    # A finished one plays nothing again.
    monkeypatch.setattr(duplex_results, "play", play_once)
    assert main([*flags, str(cut)]) == 0


def test_two_processes_give_the_scores_of_one(
    tiny: Callable[[str], Path], data: Path, tmp_path: Path, forked_python: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--model", str(tiny("o4_5")), "--data", str(data), "--batch_size", "1", "--out"]
    assert main([*flags, str(one)]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [forked_python, "-m", "finetune", "evaluate", *flags, str(two)]
    ranks = [subprocess.Popen(command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    ours, theirs = (json.loads((folder / "metrics.json").read_text())["scores"] for folder in (one, two))
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert not list(two.glob("predictions.rank*"))


def test_another_model_is_compared(tiny: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", str(tiny("o4_5"))
    assert main(["--model", model, "--data", str(data), "--out", str(out), "--compare", model]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["base"] == metrics["scores"]
    row = json.loads((out / "predictions.jsonl").read_text().splitlines()[0])
    assert RecordResult.from_text(row["prediction_played"]) == RecordResult.from_text(row["prediction_played_base"])


@pytest.mark.parametrize("flags", [["--metric", "cer"], ["--predict_only"]])
def test_flags_without_effect_are_refused(
    tiny: Callable[[str], Path], data: Path, flags: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no effect on full-duplex records"):
        main(["--model", str(tiny("o4_5")), "--data", str(data), "--out", str(tmp_path / "out"), *flags])
