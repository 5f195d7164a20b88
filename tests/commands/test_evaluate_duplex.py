"""``python -m finetune evaluate`` on full-duplex records: scores, seconds, and flags that have no effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sounds import write_wav

from finetune.commands.evaluate import main
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


@pytest.mark.parametrize("flags", [["--metric", "cer"], ["--predict_only"], ["--report_rows", "3"]])
def test_flags_without_effect_are_refused(
    tiny: Callable[[str], Path], data: Path, flags: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no effect on full-duplex records"):
        main(["--model", str(tiny("o4_5")), "--data", str(data), "--out", str(tmp_path / "out"), *flags])
