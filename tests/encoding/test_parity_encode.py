import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import parity_encode
import pytest
from parity_result import Result

from finetune.families import FAMILIES

GOLDEN = Path(__file__).parents[1] / "golden" / "encode"


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    return {result.name: result for result in parity_encode.check_folder(GOLDEN)}


def test_everything_is_equal(results: dict[str, Result]) -> None:
    assert [str(result) for result in results.values() if not result.ok] == []
    counts = {
        word: sum(word in name.split() for name in results) for word in ("slicing", "pixels", "prompt", "training")
    }
    prompts = {"v2_0": 17, "llama3_v2_5": 23, "v2_6": 28, "v4_5": 38}
    assert counts == {"slicing": 990, "pixels": 5, "prompt": sum(prompts.values()), "training": 11 + 11 + 11 + 14}
    assert {name: sum(key.startswith(f"{name} prompt") for key in results) for name in prompts} == prompts


def test_what_is_not_compared_is_named(results: dict[str, Result]) -> None:
    left_out = [name for name, result in results.items() if "not compared" in result.detail]
    assert left_out == []
    deviating = [name for name, result in results.items() if "official ids differ" in result.detail]
    single = ["single_unsliced", "single_tag_in_middle"]
    several = ["multi_image_one_turn", "multi_image_over_turns"]
    for family, cases in (
        ("llama3_v2_5", several),
        ("v2_6", [*single, *several, "literal_assistant_word"]),
        ("v4_5", [*single, *several, "literal_assistant_word"]),
    ):
        assert [name for name in deviating if name.startswith(family)] == [
            f"{family} training {case}" for case in cases
        ]


def test_exemptions_are_the_documented_ones(results: dict[str, Result]) -> None:
    on_purpose = {name for name, result in results.items() if "on purpose" in result.detail}
    literal = ("literal_image_token_pair", "literal_end_token")
    families = ("v2_0", "llama3_v2_5", "v2_6", "v4_5")
    expected = {f"{family} prompt {case}" for family in families for case in literal}
    assert on_purpose == expected | {"v4_5 prompt history_ends_with_assistant"}
    raising = [result for result in results.values() if "the official code raises" in result.detail]
    assert len(raising) == 3 + 3 + 4 + 4 + 3
    refused = [name for name, result in results.items() if "refused" in result.detail]
    assert refused == ["v2_0 training system_role"]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "tokenizers", tmp_path / "tokenizers")
    return tmp_path


def tampered(folder: Path, name: str, case: str, change: Callable[[dict[str, Any]], None]) -> Result:
    """The result of one case after a change to the recorded figures."""
    data = json.loads((GOLDEN / name).read_text())
    template, _, case = case.rpartition("/")
    found = [entry for entry in data["cases"] if entry["name"] == case]
    data["cases"] = [entry for entry in found if not template or entry["template"] == template]
    change(data["cases"][0])
    (folder / name).write_text(json.dumps(data))
    (result,) = parity_encode.check_folder(folder)
    return result


def swap(key: str, position: int, value: int) -> Callable[[dict[str, Any]], None]:
    def change(case: dict[str, Any]) -> None:
        holder = case if key in case else case["result"]
        holder[key][position] = value

    return change


@pytest.mark.parametrize(
    ("name", "case", "change", "detail"),
    [
        ("prompts_v2_0.json", "text_only_en", swap("input_ids", 3, 7), "position 3: official 7, ours 725"),
        ("prompts_v2_0.json", "image_max_slice_1", swap("image_bound", 0, 7), "image_bound: position 0"),
        ("prompts_llama3_v2_5.json", "image_max_slice_1", swap("tgt_sizes", 0, 7), "tgt_sizes: position 0"),
        ("training_minicpm.json", "text_only", swap("inference_prompt_ids", -1, 7), "prompt: position"),
        ("training_llama3.json", "text_only", swap("input_ids", -1, 7), "official ids: position"),
        ("training_llama3.json", "text_only", swap("target", 12, -100), "official target: position 12"),
        ("training_llama3.json", "text_only", swap("repeated_end_positions", 0, 13), "official target: position 13"),
        ("prompts_v2_6.json", "eleven_images", swap("input_ids", 30, 7), "position 30: official 7, ours"),
        ("prompts_v4_5.json", "thinking_on_text", swap("input_ids", -1, 7), "input_ids: position"),
        ("training_qwen.json", "v2_6/multi_turn_sliced", swap("input_ids", -1, 7), "official ids: position"),
        ("training_qwen.json", "v4_5/thinking_answer", swap("target", 214, -100), "official target: position 214"),
        ("training_qwen.json", "v4_5/single_unsliced", swap("input_ids", -1, 7), "ids without the number: position"),
        ("training_qwen.json", "v2_6/multi_image_one_turn", swap("input_ids", 310, 7), "answers: position"),
    ],
)
def test_a_difference_is_seen(copied: Path, name: str, case: str, change: Any, detail: str) -> None:
    assert tampered(copied, name, case, lambda entry: None).ok
    result = tampered(copied, name, case, change)
    assert not result.ok
    assert detail in result.detail


@pytest.mark.parametrize("name", ["v2_0", "llama3_v2_5", "v2_6", "v4_5"])
def test_a_missing_label_is_seen(copied: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    render = family.render

    def forgetful(*args: Any) -> Any:
        rendered = render(*args)
        first = next((index for index, label in enumerate(rendered.labels) if label != -100), 0)
        rendered.labels[first] = -100
        return rendered

    monkeypatch.setattr(parity_encode, "FAMILIES", [replace(family, render=forgetful)])
    case = f"{name}/multi_turn_sliced" if family.llm_type == "qwen" else "multi_turn_sliced"
    assert not tampered(copied, f"training_{family.llm_type}.json", case, lambda entry: None).ok


def test_unknown_families_are_named_and_not_failed(copied: Path) -> None:
    (copied / "prompts_v9.json").write_text('{"cases": []}')
    (result,) = parity_encode.check_folder(copied)
    assert result == Result("prompts_v9", True, "not compared: no such family here")


def test_changed_slices_and_pixels_are_seen(tmp_path: Path) -> None:
    row = {"size": [640, 480], "max_slice_nums": 9, "thumbnail": [518, 392], "grid": [1, 2], "slice": None, "items": 3}
    (tmp_path / "slicing.json").write_text(json.dumps({"header": {}, "entries": [row]}))
    shutil.copytree(GOLDEN / "pixels", tmp_path / "pixels")
    index = tmp_path / "pixels" / "index.json"
    data = json.loads(index.read_text())
    data["entries"] = data["entries"][:1]
    data["entries"][0]["slices"][1]["sha256_of_rgb_bytes"] = "0"
    index.write_text(json.dumps(data))
    slicing, pixels = parity_encode.check_folder(tmp_path)
    assert (slicing.ok, pixels.ok) == (False, False)
    assert "a_rgb_640x480/slice_01.png differs" in pixels.detail
