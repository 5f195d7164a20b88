"""A tiny network learns which colour is preferred, from the images alone; trained by a file of LLaMA-Factory."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stack import build

from dataset import SupervisedDataset
from finetune.readers.mixture import read_named
from preference_trainer import PreferenceTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
COLOURS = {"red": (220, 30, 30), "green": (30, 190, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
TRAINED, HELD_OUT = 96, 32
YAML = {
    "stage": "dpo",
    "do_train": True,
    "finetuning_type": "full",
    "freeze_vision_tower": False,
    "pref_beta": 0.1,
    "pref_loss": "sigmoid",
    "dataset": "colours",
    "eval_dataset": "held_out",
    "template": "minicpm_v",
    "cutoff_len": 2048,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 6.0,
    "learning_rate": 3.0e-4,
    "lr_scheduler_type": "constant",
    "preprocessing_num_workers": 1,
    "dataloader_num_workers": 0,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "use_cpu": True,
}


def write_pairs(folder: Path) -> None:
    """Pairs in LLaMA-Factory's ranking form; the blanked ones have the same answers and a grey image."""
    draw, columns = random.Random(0), {"messages": "conversations", "images": "images"}
    columns |= {"chosen": "chosen", "rejected": "rejected"}
    info: dict[str, Any] = {}
    records: dict[str, list[dict[str, Any]]] = {"colours": [], "held_out": []}
    Image.new("RGB", (56, 56), (128, 128, 128)).save(folder / "grey.png")
    for index in range(TRAINED + HELD_OUT):
        right, wrong = draw.sample(list(COLOURS), 2)
        shade = tuple(min(max(value + draw.randint(-25, 25), 0), 255) for value in COLOURS[right])
        Image.new("RGB", (56, 56), shade).save(folder / f"{index}.png")
        record = {
            "conversations": [{"from": "human", "value": "<image>Which colour is it?"}],
            "chosen": {"from": "gpt", "value": right},
            "rejected": {"from": "gpt", "value": wrong},
            "images": [f"{index}.png"],
        }
        records["colours" if index < TRAINED else "held_out"].append(record)
    records["blanked"] = [{**record, "images": ["grey.png"]} for record in records["held_out"]]
    for name, content in records.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
        info[name] = {"file_name": f"{name}.json", "ranking": True, "formatting": "sharegpt", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture(scope="module")
def accuracies(tiny, tmp_path_factory) -> dict[str, float]:
    """Share of right pairs at the end, of held-out pairs and of the same with grey images."""
    folder = tmp_path_factory.mktemp("colours")
    (folder / "data").mkdir()
    write_pairs(folder / "data")
    given = {**YAML, "model_name_or_path": str(tiny("v2_6")), "dataset_dir": str(folder / "data")}
    (folder / "dpo.yaml").write_text(json.dumps({**given, "output_dir": str(folder / "out")}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        trainer = build([str(folder / "dpo.yaml")])
        assert isinstance(trainer, PreferenceTrainer)
        assert isinstance(trainer.eval_dataset, SupervisedDataset)
        blanked = read_named("blanked", folder / "data", pairs=True)
        grey = SupervisedDataset(blanked, trainer.eval_dataset.sample_policy.length_policy.encoder)
        sets = {"blanked": grey, "held out": trainer.eval_dataset}
        for each in sets.values():  # the reference of both, before it trains
            trainer.eval_dataset = each
            trainer.prepare_references()
        trainer.train()
        return {name: trainer.evaluate(each)["eval_rewards/accuracies"] for name, each in sets.items()}


def test_held_out_pairs_are_told_apart_by_their_images(accuracies):
    assert accuracies["held out"] >= 0.95


def test_without_images_it_is_a_guess(accuracies):
    assert 0.2 <= accuracies["blanked"] <= 0.8
