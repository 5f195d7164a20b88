"""Every generation, full, LoRA and LoRA in 4 bit, on every kind of data: two steps, saved, loaded anew, asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from clips import write_clip
from matrix_worker import DATA, EXAMPLES, MORE, PAIRS, data_of, kinds_of
from PIL import Image
from safetensors import safe_open
from side_by_side import Command, run_all
from sounds import write_wav
from variants import NAMES, VARIANTS

WORKER = Path(__file__).with_name("matrix_worker.py")
RUNS = [f"{name}-{kind}-{records}" for name in VARIANTS for kind in kinds_of(name) for records in data_of(name, kind)]


def write_data(folder: Path) -> Path:
    """A file per kind of data, four records each; the first image is cut into slices."""
    folder.mkdir()
    for index, size in enumerate(((224, 112), (112, 112), (60, 150))):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{index}.png")
    records: dict[str, list[dict]] = {name: [] for name in (*DATA, *MORE, PAIRS, "columns", "timelines")}
    write_clip(folder / "0.mp4", 12, fps=6, size=(112, 64))
    write_clip(folder / "1.gif", 8, fps=4, size=(60, 112))
    for index in range(3):
        write_wav(folder / f"{index}.wav", 0.4 + 0.7 * index, pitch=300 + 200 * index)
    for index in range(4):
        answer = {"role": "assistant", "content": f"It is number {index}."}
        plain = [{"role": "user", "content": "Which number?"}, answer]
        marked = [{"role": "user", "content": "<image>\nWhich number?"}, answer]
        both = [{"role": "user", "content": "<image_00>\nThe first, then <image_01>: which?"}, answer]
        both += [{"role": "user", "content": "And this?\n<image_02>"}, {"role": "assistant", "content": "Three."}]
        several = {f"<image_0{place}>": f"{place}.png" for place in range(3)}
        records["text"].append({"id": str(index), "conversations": plain})
        records["image"].append({"id": str(index), "image": f"{index % 3}.png", "conversations": marked})
        # Two clips, one beside an image, one alone, none.
        heard = [{"audio": ["0.wav", "1.wav"]}, {"audio": "2.wav", "image": "1.png"}, {"audio": "1.wav"}, {}][index]
        records["audio"].append({"id": str(index), **heard, "conversations": plain})
        # One video, two of them beside an image, none.
        seen = [{"video": "0.mp4"}, {"video": ["1.gif", "0.mp4"], "image": "1.png"}, {"video": "1.gif"}, {}][index]
        records["video"].append({"id": str(index), **seen, "conversations": plain})
        records["several"].append({"id": str(index), "image": several, "conversations": both})
        timeline = {"user": [{"audio": "2.wav", "start": 0}], "assistant": [{"text": "Now.", "start": index + 0.5}]}
        # RLAIF-V's columns.
        texts = {"question": "Which number?", "chosen": f"It is number {index}.", "rejected": "It is a letter."}
        records["columns"].append({"image": f"{index % 3}.png", **texts})
        records["timelines"].append({"id": str(index), "duplex": timeline})
        worse = {"rejected_response": "I would say that it is a letter."}
        records[PAIRS].append({**records[("image", "text", "several", "image")[index]][-1], **worse})
    for name, content in records.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def matrix(tiny, tmp_path_factory, forked_python: str) -> Path:
    """The folder of all results: trained by one process, then loaded by another."""
    folder = tmp_path_factory.mktemp("generations")
    data = write_data(folder / "data")
    (folder / "models").mkdir()
    (folder / "out").mkdir()
    for name in VARIANTS:
        (folder / "models" / name).symlink_to(tiny(name))
    paths = ["--models", str(folder / "models"), "--data", str(data), "--out", str(folder / "out")]
    for action in ("train", "reload"):
        words = [forked_python, str(WORKER), action, *paths, "--families", *VARIANTS]
        run_all(Command(words, {"TMPDIR": str(folder)}), timeout=900)
    return folder / "out"


@pytest.mark.parametrize("name", RUNS)
def test_trained_saved_loaded_asked(matrix, name):
    result = json.loads((matrix / "runs.json").read_text())[name]["result"]
    assert (result["status"], result["steps"]) == ("ok", 2)
    assert result["train_loss"] > 0
    assert result["eval_loss"] > 0
    reloaded = json.loads((matrix / "reloaded.json").read_text())[name]
    assert reloaded["status"] == 0, reloaded["said"]
    assert "logit_difference=0 " in reloaded["said"], reloaded["said"]
    assert len(reloaded["answers"]) == 2
    assert all(isinstance(answer, str) for answer in reloaded["answers"])
    assert isinstance(reloaded.get("chat"), str) == name.endswith("image")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_makes_a_step(matrix, name):
    """Those with LoRA for a family are runs of the matrix."""
    result = json.loads((matrix / "examples.json").read_text())[name]
    assert (result["status"], result["steps"]) == ("ok", 1)


def test_preference_training_on_columns_ends_in_a_report_with_answers_before_and_after(matrix):
    page = (matrix / "dpo" / "report.html").read_text()
    for words in ("Which number?", "It is number 0.", "Answer before training", "Answer at step 1"):
        assert page.count(words) >= 1, words
    assert page.count("data:image/jpeg;base64,") == 2


def test_there_are_no_other_examples():
    folder = WORKER.parents[2] / "examples"
    assert {path.stem for path in folder.glob("*.yaml")} == set(EXAMPLES)
    assert {path.stem for path in (folder / "lora").glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("path", sorted((WORKER.parents[2] / "examples").rglob("*.yaml")), ids=lambda path: path.stem)
def test_example_says_what_it_is_for_how_it_is_launched_and_what_it_needs(path):
    head = path.read_text().split("\n\n")[0]
    assert f"finetune.py examples/{path.relative_to(WORKER.parents[2] / 'examples')}" in head
    assert "# Memory: " in head


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of a part of the network, or of the adapters on it."""
    found = {}
    for path in folder.glob("*model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if part in name}  # noqa: SIM118 - no mapping
    return found


@pytest.mark.parametrize("name", [run for run in RUNS if run.endswith("audio")])
def test_the_audio_tower_has_learnt(matrix, tiny, name):
    family, kind, _ = name.split("-")
    found = weights(matrix / name, "apm.")
    if kind == "lora":
        learnt = {key for key, tensor in found.items() if "lora_B" in key and tensor.abs().max() > 0}
        assert learnt == {key for key in found if "lora_B" in key} != set()
    else:
        base = weights(tiny(family), "apm.")
        same = {key for key, tensor in base.items() if torch.equal(tensor, found[key])}
        assert same == {"apm.embed_positions.weight"}
