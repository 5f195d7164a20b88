"""--report_to: one run per tracker, without a network; what arrives there are the losses of the run."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.run import train

OFFLINE = {
    "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": "{folder}"},
    "swanlab": {"SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": "{folder}"},
    "trackio": {"TRACKIO_DIR": "{folder}"},
    "mlflow": {"MLFLOW_TRACKING_URI": "sqlite:///{folder}/runs.db"},
}


def _wandb(folder: Path) -> list[float]:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    store, losses = DataStore(), []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            if item.key == "train/loss" or list(item.nested_key) == ["train/loss"]:
                losses.append(float(json.loads(item.value_json)))
    return losses


def _swanlab(folder: Path) -> list[float]:
    (file,) = folder.glob("run-*/backup.swanlab")
    found = re.findall(rb'"metric": {"index": \d+, "data": ([\d.]+), [^}]*}, "key": "train/loss"', file.read_bytes())
    return [float(value) for value in found]


def _trackio(folder: Path) -> list[float]:
    (file,) = [path for path in folder.glob("*.db") if path.stat().st_size]
    rows = sqlite3.connect(file).execute("select metrics from metrics order by step").fetchall()
    values = [json.loads(row) for (row,) in rows]
    return [value["train/loss"] for value in values if "train/loss" in value]


def _mlflow(folder: Path) -> list[float]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/runs.db")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return [entry.value for entry in client.get_metric_history(run.info.run_id, "loss")]


READERS: dict[str, Callable[[Path], list[float]]] = {
    "wandb": _wandb,
    "swanlab": _swanlab,
    "trackio": _trackio,
    "mlflow": _mlflow,
}


@pytest.mark.parametrize("tracker", OFFLINE)
def test_the_losses_of_a_run_arrive(tiny, demo_data, tmp_path, monkeypatch, tracker) -> None:
    folder = tmp_path / "tracked"
    folder.mkdir()
    for name, value in {"CUDA_VISIBLE_DEVICES": "", **OFFLINE[tracker]}.items():
        monkeypatch.setenv(name, value.format(folder=folder))
    result = train(
        nproc=1,
        model_name_or_path=tiny("v2_0"),
        data_path=demo_data / "train.json",
        output_dir=tmp_path / "out",
        use_lora=True,
        max_steps=2,
        logging_steps=1,
        report_to=tracker,
        run_name="two steps",
        verify_adapter="off",
    )
    state = json.loads((result.folder / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 2
    assert READERS[tracker](folder) == pytest.approx(losses, rel=1e-4)
