"""Data sets of dataset_info.json, as LLaMA-Factory's users write it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from finetune.readers.mixture import Mixture, read_named
from finetune.sample import DataError, Sample, Text

# As the published guide for MiniCPM-V has them, with names of its pictures.
IMAGE_CAPTION = """
[
  {
    "messages": [
      {
        "content": "<image>Who are they?",
        "role": "user"
      },
      {
        "content": "They're Kane and Gretzka from Bayern Munich.",
        "role": "assistant"
      },
      {
        "content": "What are they doing?<image>",
        "role": "user"
      },
      {
        "content": "They are celebrating on the soccer field.",
        "role": "assistant"
      }
    ],
    "images": [
      "mllm_demo_data/1.jpg",
      "mllm_demo_data/1.jpg"
    ]
  },
  {
    "messages": [
      {
        "content": "<image>Who is he?",
        "role": "user"
      },
      {
        "content": "He's Thomas Muller from Bayern Munich.",
        "role": "assistant"
      },
      {
        "content": "Why is he on the ground?",
        "role": "user"
      },
      {
        "content": "Because he's sliding on his knees to celebrate.",
        "role": "assistant"
      }
    ],
    "images": [
      "mllm_demo_data/2.jpg"
    ]
  }
]
"""
VIDEO_AUDIO = """
[
  {"messages": [{"content": "<video>Why is this video funny?", "role": "user"},
                {"content": "Because a baby is reading, and he is so cute!", "role": "assistant"}],
   "videos": ["mllm_demo_data/1.mp4"]},
  {"messages": [{"content": "<audio>What's that sound?", "role": "user"},
                {"content": "It is the sound of glass shattering.", "role": "assistant"}],
   "audios": ["mllm_demo_data/1.mp3"]}
]
"""
INFO = """
{
  "cpmv_img": {
      "file_name": "image_caption.json",
      "formatting": "sharegpt",
      "columns": {
        "messages": "messages",
        "images": "images"
      },
      "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant"
      }
  },
  "mllm_demo": {
      "file_name": "image_caption.json",
      "formatting": "sharegpt",
      "columns": {
        "messages": "messages",
        "images": "images"
      }
  },
  "mllm_video_audio_demo": {
      "file_name": "mllm_video_audio_demo.json",
      "formatting": "sharegpt",
      "columns": {
        "messages": "messages",
        "videos": "videos",
        "audios": "audios"
      },
      "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant"
      }
  }
}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the guide's data folder in it."""
    media = tmp_path / "data" / "mllm_demo_data"
    media.mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (30 * number, 20)).save(media / f"{number}.jpg")
    for name in ("1.mp4", "1.mp3"):
        (media / name).write_bytes(b"")
    (tmp_path / "data" / "image_caption.json").write_text(IMAGE_CAPTION)
    (tmp_path / "data" / "mllm_video_audio_demo.json").write_text(VIDEO_AUDIO)
    (tmp_path / "data" / "dataset_info.json").write_text(INFO)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def register(work: Path, records: list[Any], name: str = "mine", **entry: Any) -> None:
    (work / "data" / f"{name}.json").write_text(json.dumps(records))
    described = {"file_name": f"{name}.json", **entry}
    described = {key: value for key, value in described.items() if value is not None}
    (work / "data" / "dataset_info.json").write_text(json.dumps({name: described}))


def shown(sample: Sample) -> list[tuple[str, str]]:
    return [(message.role, "".join(map(_show, message.parts))) for message in sample.messages]


def _show(part: Any) -> str:
    return part.text if isinstance(part, Text) else f"[{part.kind} {part.data}]"


@pytest.mark.parametrize("name", ["cpmv_img", "mllm_demo"])
def test_the_guide_as_typed(work: Path, name: str) -> None:
    samples = read_named(name)
    folder = work / "data" / "mllm_demo_data"
    assert shown(samples[0]) == [
        ("user", f"[image {folder}/1.jpg]Who are they?"),
        ("assistant", "They're Kane and Gretzka from Bayern Munich."),
        ("user", f"What are they doing?[image {folder}/1.jpg]"),
        ("assistant", "They are celebrating on the soccer field."),
    ]
    assert [len(list(sample.media())) for sample in samples] == [2, 1]
    assert str(samples.source(1)) == "data/image_caption.json, record 1"


def test_video_and_audio_as_typed(work: Path) -> None:
    folder = work / "data" / "mllm_demo_data"
    questions = [shown(sample)[0][1] for sample in read_named("mllm_video_audio_demo")]
    assert questions == [f"[video {folder}/1.mp4]Why is this video funny?", f"[audio {folder}/1.mp3]What's that sound?"]


def test_media_are_looked_for_in_media_dir_then_beside_the_file(work: Path) -> None:
    elsewhere = work / "media" / "mllm_demo_data"
    elsewhere.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(elsewhere / "2.jpg")
    samples = read_named("cpmv_img", media_dir="media")
    assert [next(sample.media()).data for sample in samples] == [
        work / "data" / "mllm_demo_data" / "1.jpg",
        elsewhere / "2.jpg",
    ]
    (work / "data" / "mllm_demo_data" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"record 0: image .*looked for .*media.*data.*give --media_dir"):
        samples[0]


SPOKEN = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
ALPACA = {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f", "question": "g"}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({}, ["user a\nb", "assistant c"]),
        ({"formatting": "alpaca"}, ["user a\nb", "assistant c"]),
        ({"columns": {"prompt": "instruction", "response": "output"}}, ["user a", "assistant c"]),
        (
            {"columns": {"prompt": "question", "response": "output", "system": "system"}},
            ["system f", "user g", "assistant c"],
        ),
        (
            {"columns": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}},
            ["user d", "assistant e", "user a\nb", "assistant c"],
        ),
    ],
)
def test_columns_of_alpaca_data(work: Path, entry: dict[str, Any], expected: list[str]) -> None:
    register(work, [ALPACA], **entry)
    assert [" ".join(turn) for turn in shown(read_named("mine")[0])] == expected


def test_what_is_not_used_is_said(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    register(work, [ALPACA], columns={"prompt": "instruction", "response": "output"}, subset="x")
    read_named("mine")
    assert "records have 'input', 'history', 'system', not used" in caplog.text
    assert "data set 'mine': 'subset' has no effect on a file" in caplog.text


def test_tags_that_are_not_named_keep_their_words(work: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "u", "content": "Hi"},
        {"role": "function_call", "content": "f"},
    ]
    turns += [{"role": "observation", "content": "o"}, {"role": "a", "content": "Ho"}]
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "u", "assistant_tag": "a"}
    register(work, [{"conversations": turns}], formatting="sharegpt", tags=tags)
    roles = [role for role, _ in shown(read_named("mine")[0])]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]


def test_other_formats(work: Path) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Ho"}]
    register(work, [{"messages": chat}], formatting="openai")
    assert shown(read_named("mine")[0]) == [("user", "Hi"), ("assistant", "Ho")]
    register(work, [{"image": "mllm_demo_data/1.jpg", "conversations": SPOKEN}])
    assert shown(read_named("mine")[0])[0] == ("user", f"[image {work}/data/mllm_demo_data/1.jpg]\nHi")
    register(work, [{"conversations": SPOKEN, "images": ["x"]}], formatting="sharegpt")
    assert shown(read_named("mine")[0]) == [("user", "Hi"), ("assistant", "Ho")]


def test_a_folder_and_a_part_of_it(work: Path) -> None:
    folder = work / "data" / "parts"
    folder.mkdir()
    for number in range(4):
        lines = [json.dumps({"id": f"{number}-{place}", "conversations": SPOKEN}) for place in range(5)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    register(work, [], file_name="parts", formatting="sharegpt", split="train[30%:60%]")
    samples = read_named("mine")
    assert [sample.id for sample in samples] == ["1-1", "1-2", "1-3", "1-4", "2-0", "2-1"]


def test_parquet(work: Path) -> None:
    rows = [{"conversations": SPOKEN, "images": []}, {"conversations": SPOKEN, "images": None}]
    datasets.Dataset.from_list(rows).to_parquet(work / "data" / "rows.parquet")
    columns = {"messages": "conversations", "images": "images"}
    register(work, [], file_name="rows.parquet", formatting="sharegpt", columns=columns)
    assert [shown(sample) for sample in read_named("mine")] == [[("user", "Hi"), ("assistant", "Ho")]] * 2


def test_num_samples(work: Path) -> None:
    records = [{"id": str(number), "conversations": SPOKEN} for number in range(10)]

    def ids(number: int, seed: int = 1) -> list[str]:
        register(work, records, formatting="sharegpt", num_samples=number)
        return [sample.id for sample in read_named("mine", seed=seed)]

    few = ids(4)
    assert len(set(few)) == 4
    assert ids(4) == few
    assert ids(4, seed=2) != few
    many = ids(14)
    assert len(many) == 14
    assert set(many) == {str(number) for number in range(10)}


COLUMNS = {"messages": "conversations"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"file_name": None}, "has no 'file_name'; give the file or folder, relative to data"),
    ({"file_name": "gone.json"}, r"file_name 'gone.json' does not exist \(looked for .*/data/gone.json\)"),
    ({"formating": "sharegpt"}, "unknown key 'formating'; did you mean 'formatting'? Known are file_name"),
    ({"formatting": "share"}, "'formatting' is \"share\"; there are official, sharegpt, alpaca, openai"),
    ({"columns": {"image": "images"}}, "columns: unknown name 'image'; did you mean 'images'?"),
    ({"tags": {"user": "u"}}, "tags: unknown name 'user'; did you mean 'user_tag'?"),
    ({"tags": {"user_tag": "x", "assistant_tag": "x"}}, "tags: 'x' is used twice"),
    ({"columns": ["images"]}, "'columns' is a list; it must be an object"),
    ({"columns": {"images": 3}}, "columns: 'images' is 3; it must be a string"),
    ({"columns": COLUMNS}, "columns has 'messages', and without 'formatting' .* add \"formatting\": \"sharegpt\""),
    ({"formatting": "sharegpt", "columns": {"images": "images"}}, 'columns does not name the turns .* add "messages"'),
    (
        {"formatting": "sharegpt", "columns": {"messages": "conversation"}},
        "none of the 1 inspected records has 'conversation', the column of messages .*did you mean 'conversations'?",
    ),
    (
        {"formatting": "sharegpt", "columns": {**COLUMNS, "images": "image"}},
        "has 'image', the column of images .*did you mean 'images'?",
    ),
    (
        {"formatting": "alpaca"},
        r"has 'instruction', the column of prompt \(found 'conversations', 'images'\); name the",
    ),
    ({"ranking": True}, "is preference data .ranking., which --stage dpo trains on; for supervised finetuning name"),
    ({"columns": {"chosen": "a", "rejected": "b"}}, "is preference data .ranking., which --stage dpo"),
    ({"columns": {"kto_tag": "a"}}, "columns has kto_tag: answers with a tag are not read"),
    ({"num_samples": 0}, "'num_samples' is 0; it must be a number of records, at least 1"),
    ({"split": "test"}, "split 'test' is not supported; local files have 'train'"),
    ({"split": 3}, "'split' is 3; it must be a string"),
    (
        {"file_name": None, "ms_hub_url": "a/b"},
        "is at ms_hub_url, and data sets of ModelScope are not fetched; download it",
    ),
    ({"file_name": None, "om_hub_url": "a/b"}, "om_hub_url, and data sets of openMind are not fetched"),
    ({"file_name": None, "script_url": "a.py"}, "script_url, and loading scripts are not run"),
    ({"file_name": None, "cloud_file_name": "s3://a"}, "cloud_file_name, and files in a cloud are not fetched"),
]


@pytest.mark.parametrize(("entry", "message"), BAD)
def test_bad_entries(work: Path, entry: dict[str, Any], message: str) -> None:
    register(work, [{"conversations": SPOKEN, "images": []}], **{"formatting": None, **entry})
    with pytest.raises(DataError, match="data/dataset_info.json, data set 'mine'.*" + message.replace("?", r"\?")):
        read_named("mine")


def test_an_unknown_tag_names_the_record(work: Path) -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    turns = [{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}]
    register(work, [{"conversations": turns}], formatting="sharegpt", tags=tags)
    with pytest.raises(
        DataError, match=r"data/mine.json, record 0: turn 0: 'role' is 'human', an unknown role; known are system, user"
    ):
        read_named("mine")[0]


def test_names_that_are_not_registered(work: Path) -> None:
    with pytest.raises(
        DataError, match="no data set 'cpmv_imgs' is registered; did you mean 'cpmv_img'.*mllm_demo, mllm_v"
    ):
        read_named("cpmv_imgs")
    with pytest.raises(
        DataError, match=r"elsewhere/dataset_info.json: no such file .*give the folder .* as --dataset_dir"
    ):
        read_named("cpmv_img", "elsewhere")
    with pytest.raises(DataError, match="--dataset_dir ONLINE: descriptions are not fetched"):
        read_named("cpmv_img", "ONLINE")
    (work / "data" / "dataset_info.json").write_text('{\n"a": {},}')
    with pytest.raises(DataError, match=r"data/dataset_info.json, line 2: not valid JSON"):
        read_named("a")


@pytest.fixture
def hub(work: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of a hub, which has pictures for two questions."""
    entry = {"hf_hub_url": "some/data", "subset": "tiny", "folder": "v1", "split": "test", "formatting": "sharegpt"}
    columns = {"messages": "conversations", "images": "images"}
    (work / "data" / "dataset_info.json").write_text(json.dumps({"far": {**entry, "columns": columns}}))
    asked: list[Any] = []

    def load_dataset(*words: Any, **options: Any) -> datasets.Dataset:
        asked.append((words, options))
        turns = [{"from": "human", "value": "<image>Hi"}, SPOKEN[1]]
        rows = [{"conversations": turns, "images": [Image.new("RGB", (20, 10))]}] * 2
        features = datasets.Features(
            conversations=datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
            images=datasets.List(datasets.Image()),
        )
        return datasets.Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_data_set_of_the_hub(hub: list[Any]) -> None:
    samples = read_named("far")
    (media,) = samples[1].media()
    assert isinstance(media.data, Image.Image)
    assert (media.data.size, str(samples.source(1)), samples.files) == ((20, 10), "some/data, record 1", [])
    assert hub == [(("some/data",), {"name": "tiny", "data_dir": "v1", "split": "test"})]


def test_the_hub_without_a_network(hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        DataError, match="data set 'far': some/data of .* cannot be loaded .HF_HUB_OFFLINE is set.*go online"
    ):
        read_named("far")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(DataError, match=r"\(no route\); go online once, or download it"):
        read_named("far")


def test_the_reading_is_said(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert isinstance(read_named("cpmv_img"), Mixture)
    assert (
        "data set cpmv_img: 2 records of data/image_caption.json in the sharegpt format (as dataset_info.json s"
        in caplog.text
    )
    assert "data set cpmv_img: 2 samples, 100.0 % of 2" in caplog.text
