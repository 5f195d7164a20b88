"""Answers on disk: what a stopped evaluation leaves is used, and nothing of another evaluation."""

from __future__ import annotations

import json

import pytest

from finetune.evaluation.predictions import Predictions, fingerprint, start_folder
from finetune.utils.errors import UserError


def test_what_is_there_is_not_asked_again(tmp_path):
    first, second = Predictions(tmp_path), Predictions(tmp_path, rank=1)
    first.add([3, 0], ["three\nlines", "zero"])
    second.add([1], ["one"])
    second.add([1], ["base"], "prediction_base")
    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write('{"index": 2, "predic')  # killed while writing
    store = Predictions(tmp_path)
    assert store.missing(range(5)) == [2, 4]
    assert store.missing(range(2), "prediction_base") == [0]
    store.add([2, 4], ["two", "four"])
    assert store.collect([0, 1, 2, 3, 4]) == ["zero", "one", "two", "three\nlines", "four"]
    assert store.collect([1], "prediction_base") == ["base"]
    store.replace({"index": index, "prediction": str(index)} for index in range(5))
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
    assert Predictions(tmp_path).missing(range(5)) == []


def test_a_folder_belongs_to_one_evaluation(tmp_path):
    folder = tmp_path / "out"
    start_folder(folder, {"model": "a", "max_new_tokens": 8})
    start_folder(folder, {"model": "b", "max_new_tokens": 8})
    Predictions(folder).add([0], ["x"])
    start_folder(folder, {"model": "b", "max_new_tokens": 8})
    with pytest.raises(UserError, match=r"model was 'b' and is 'c'.*--overwrite"):
        start_folder(folder, {"model": "c", "max_new_tokens": 8})
    start_folder(folder, {"model": "c", "max_new_tokens": 8}, overwrite=True)
    assert Predictions(folder).missing([0]) == [0]
    assert json.loads((folder / "evaluation.json").read_text())["model"] == "c"


def test_a_model_trained_again_is_another(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert fingerprint(tmp_path) != before
