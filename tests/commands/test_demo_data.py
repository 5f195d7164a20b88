import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.commands import demo_data
from finetune.media.slicing import SliceSpec, plan
from finetune.tiny.config_files import SCALE_RESOLUTION

NAMES = {
    (1, 1, 1): "black",
    (253, 1, 1): "red",
    (1, 253, 1): "green",
    (1, 1, 253): "blue",
    (253, 253, 1): "yellow",
    (253, 1, 253): "magenta",
    (1, 253, 253): "cyan",
    (253, 253, 253): "white",
}
QUESTIONS = {
    "single": "What colour is the square?",
    "sliced": "What colour are the fine dots?",
    "multi_image": "What colours are the squares?",
    "multi_turn": "What colour is the square?",
}
SPEC = SliceSpec(max_slice_nums=9, scale_resolution=SCALE_RESOLUTION, patch_size=14)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_data.write_demo_dataset(tmp_path_factory.mktemp("demo") / "data", train=64, eval=32, seed=5)


def records(folder: Path, split: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{split}.json").read_text())


def paths(record: dict[str, Any]) -> list[str]:
    image = record["image"]
    if isinstance(image, dict):
        return list(image.values())
    return image if isinstance(image, list) else [image]


def pixels(image: Image.Image) -> Counter[tuple[int, int, int]]:
    data = image.tobytes()
    return Counter(zip(data[::3], data[1::3], data[2::3], strict=True))


def colour_of(path: Path) -> str:
    """The colour of the strongest pixels, read from the file alone."""
    with Image.open(path) as image:
        found = {NAMES[pixel] for pixel in pixels(image) if pixel in NAMES}
    assert len(found) == 1, (path, found)
    return found.pop()


def test_equal_arguments_give_equal_files(folder: Path, tmp_path: Path) -> None:
    again = demo_data.write_demo_dataset(tmp_path / "again", train=64, eval=32, seed=5)
    names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(again) for file in again.rglob("*") if file.is_file())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    other = demo_data.write_demo_dataset(tmp_path / "other", train=64, eval=32, seed=6)
    assert (folder / "train.json").read_bytes() != (other / "train.json").read_bytes()


def test_a_longer_split_starts_with_the_shorter_one(folder: Path, tmp_path: Path) -> None:
    longer = demo_data.write_demo_dataset(tmp_path / "longer", train=8, eval=40, seed=5)
    assert records(longer, "eval")[:32] == records(folder, "eval")


@pytest.mark.parametrize("split", ["train", "eval"])
def test_answers_follow_from_the_pixels(folder: Path, split: str) -> None:
    for record in records(folder, split):
        seen = [colour_of(folder / path) for path in paths(record)]
        turns = record["conversations"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        asked = {turn["content"].rpartition("\n")[2] for turn in turns[::2]}
        assert asked == {QUESTIONS[record["task"]]}
        answers = [turn["content"] for turn in turns[1::2]]
        if record["task"] == "multi_image":
            assert answers == [f"first {seen[0]}, second {seen[1]}"]
        else:
            assert answers == seen
        assert len(set(seen)) == len(seen) == (2 if record["task"].startswith("multi") else 1)


def test_every_kind_and_every_form_of_the_image_entry(folder: Path) -> None:
    for split in ("train", "eval"):
        counted = Counter(record["task"] for record in records(folder, split))
        assert set(counted) == {"single", "sliced", "multi_image", "multi_turn"}
        assert len(set(counted.values())) == 1
    forms = {type(record["image"]) for record in records(folder, "train")}
    assert forms == {str, list, dict}
    for record in records(folder, "train"):
        text = " ".join(turn["content"] for turn in record["conversations"][::2])
        tags = list(record["image"]) if isinstance(record["image"], dict) else ["<image>"] * len(paths(record))
        assert re.findall(r"<image(?:_\d+)?>", text) == tags


def test_answers_are_balanced(folder: Path) -> None:
    by_task: dict[str, Counter[str]] = {}
    for record in records(folder, "eval"):
        first = record["conversations"][1]["content"].removeprefix("first ").partition(",")[0]
        by_task.setdefault(record["task"], Counter())[first] += 1
    assert all(counted == dict.fromkeys(NAMES.values(), 1) for counted in by_task.values())


def test_splits_share_no_image(folder: Path) -> None:
    hashes = {}
    for split in ("train", "eval"):
        images = [Image.open(folder / path) for record in records(folder, split) for path in paths(record)]
        hashes[split] = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        assert len(set(hashes[split])) == len(hashes[split])
    assert not set(hashes["train"]) & set(hashes["eval"])


def test_dots_are_cut_and_only_the_slices_show_their_colour(folder: Path) -> None:
    for record in records(folder, "train"):
        for path in paths(record):
            with Image.open(folder / path) as image:
                plans = plan(*image.size, SPEC)
                if record["task"] != "sliced":
                    assert plans.items == 1
                    continue
                assert plans.items == 5
                # Slices at full resolution: the dots stay one pixel wide.
                assert plans.refined == image.size
                thumbnail = image.resize(plans.thumbnail, Image.Resampling.BICUBIC)
                chroma = sum(count for pixel, count in pixels(thumbnail).items() if max(pixel) - min(pixel) > 32)
                assert chroma == 0


def test_blanked_twin(folder: Path) -> None:
    for record, twin in zip(records(folder, "eval"), records(folder, "eval_blanked"), strict=True):
        assert {**twin, "image": None} == {**record, "image": None}
        assert type(twin["image"]) is type(record["image"])
        for path, blank in zip(paths(record), paths(twin), strict=True):
            with Image.open(folder / path) as image, Image.open(folder / blank) as grey:
                assert grey.size == image.size
                assert set(pixels(grey)) == {(127, 127, 127)}


def test_refuses_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path / "data"), "--train", "4", "--eval", "4"]
    assert demo_data.main(arguments) == 0
    assert demo_data.main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert demo_data.main([*arguments, "--overwrite"]) == 0
    (tmp_path / "data" / "README.md").unlink()
    assert demo_data.main([*arguments, "--overwrite"]) == 2
    assert (tmp_path / "data" / "train.json").exists()
