"""use_image_id: decided once, and carried by adapters, full results and merged models into every prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from folders import linked, put
from made_adapters import make_adapter, save
from PIL import Image

from finetune.__main__ import main
from finetune.arguments.parse import parse_arguments
from finetune.chat.pipeline import ChatPipeline, ChatPromptOptions
from finetune.chat.session import OFF, ChatSession
from finetune.checkpoints.base_checkpoint import (
    FULL_FILES,
    BaseCheckpoint,
    changes_note,
    copy_base_files,
    resolve_base,
)
from finetune.checkpoints.run_start import describe_training, find_base
from finetune.checkpoints.saving import finish_adapter, write_run
from finetune.commands import export
from finetune.data_check.check_cache import fingerprint
from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import LengthPolicy
from finetune.families import FAMILIES, by_name
from finetune.model_folders.image_ids import write_image_ids
from finetune.models import load_model, load_tokenizer
from finetune.sample import Media, Message, Sample, Source, Text, as_sample_set
from finetune.utils.errors import ArgumentError, CheckpointError, UserError

WITH_IMAGE_IDS = [family.name for family in FAMILIES if "use_image_id" in family.settings]
OTHERS = [family.name for family in FAMILIES if "use_image_id" not in family.settings]
PROCESSOR = "preprocessor_config.json"


def encoder(base: BaseCheckpoint) -> Encoder:
    return Encoder(base.family, load_tokenizer(base.folder), base.settings)


def question(*texts: str) -> Sample:
    parts = [part for text in texts for part in (Media("image", Image.new("RGB", (112, 112))), Text(text))]
    return Sample("0", Source("memory", 0), (Message("user", tuple(parts)),))


def prompt(made: Encoder) -> str:
    ids = made.encode(question("\nWhat?", "And?"), generate=True).input_ids.tolist()
    text = made.tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("family", [name for name in ("v2_6", "v4_5", "o2_6", "v4_6") if name in WITH_IMAGE_IDS])
def test_the_flag_takes_the_numbers_out_and_a_result_keeps_it(tiny, tmp_path: Path, family: str) -> None:
    folder = tiny(family)
    base, without = resolve_base(str(folder)), resolve_base(str(folder), use_image_id=False)
    assert base.image_ids is not None
    assert base.image_ids.used
    numbered = prompt(encoder(base))
    assert "<image_id>1</image_id>" in numbered
    plain = numbered.replace("<image_id>0</image_id>", "").replace("<image_id>1</image_id>", "")
    assert prompt(encoder(without)) == plain
    assert base.choices == [line for line in without.choices if "use_image_id" not in line]
    copy_base_files(without, tmp_path, FULL_FILES)
    changed = {path.name for path in tmp_path.iterdir() if path.read_bytes() != (folder / path.name).read_bytes()}
    assert changed <= {PROCESSOR, "processor_config.json", "config.json"}
    for name in changed:
        before = (folder / name).read_text()
        assert (tmp_path / name).read_text() == before.replace('"use_image_id": true', '"use_image_id": false')
    again = resolve_base(str(tmp_path))
    assert prompt(encoder(again)) == plain
    assert changes_note(again) == ""
    assert "use_image_id false in place of true" in changes_note(without)
    assert prompt(encoder(resolve_base(str(tmp_path), use_image_id=True))) == numbered


def test_the_processor_of_transformers_reads_what_was_written(tiny, tmp_path: Path) -> None:
    without = resolve_base(str(tiny("v4_6")), use_image_id=False)
    copy_base_files(without, tmp_path, FULL_FILES)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (112, 112))}]}]
    ids = processor.apply_chat_template(turns, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
    assert "<image_id>" not in processor.decode(ids[0])
    sample = Sample("0", Source("memory", 0), (Message("user", question("").messages[0].parts[:1]),))
    assert encoder(without).encode(sample, generate=True).input_ids.tolist() == list(ids[0])


def test_a_folder_without_processor_file_keeps_it_in_config_json(tiny, tmp_path: Path) -> None:
    folder = linked(tiny("v2_6"), tmp_path / "base")
    (folder / PROCESSOR).unlink()
    put(folder / "config.json", {**json.loads((folder / "config.json").read_text()), "use_image_id": True})
    without = resolve_base(str(folder), use_image_id=False)
    (tmp_path / "out").mkdir()
    copy_base_files(without, tmp_path / "out", FULL_FILES)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**json.loads((folder / "config.json").read_text()), "use_image_id": False}
    assert "<image_id>" not in prompt(encoder(resolve_base(str(tmp_path / "out"))))


def test_a_missing_key_means_what_published_inference_takes_it_for(tiny, tmp_path: Path) -> None:
    """An image processor of 2.6 without the key numbers nothing, one of 4.6 numbers images."""
    for family, file, default in (("v2_6", PROCESSOR, False), ("v4_6", "processor_config.json", True)):
        folder = linked(tiny(family), tmp_path / family)
        content = json.loads((folder / file).read_text())
        (content.get("image_processor") or content).pop("use_image_id")
        put(folder / file, content)
        before = (folder / file).read_bytes()
        write_image_ids(folder, by_name(family), default)
        assert (folder / file).read_bytes() == before
        write_image_ids(folder, by_name(family), not default)
        ids = resolve_base(str(folder)).image_ids
        assert ids is not None
        assert ids.used is not default


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("wish", ["true", "false"])
def test_families_without_numbers_refuse_the_flag(tiny, family: str, wish: str) -> None:
    words = ["--model_name_or_path", str(tiny(family)), "--data_path", "d", "--use_cpu", "true"]
    assert find_base(parse_arguments(words)).image_ids is None
    with pytest.raises(ArgumentError, match=f"--use_image_id {wish}: .* does not number images .*2.6.*omit the flag"):
        find_base(parse_arguments([*words, "--use_image_id", wish]))


def test_what_is_remembered_depends_on_it(tiny) -> None:
    made = [encoder(resolve_base(str(tiny("v2_6")), use_image_id=used)) for used in (True, False)]
    assert len({fingerprint(LengthPolicy(each), as_sample_set([])) for each in made}) == 2


@pytest.fixture(scope="module")
def lora(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a run without image ids, on a base that has them, as a run writes it."""
    output = tmp_path_factory.mktemp("ids") / "lora"
    words = ["--model_name_or_path", str(tiny("v2_6")), "--data_path", "d", "--use_cpu", "true", "--use_lora", "true"]
    args = parse_arguments([*words, "--use_image_id", "false"])
    base = find_base(args)
    assert "use_image_id false (--use_image_id; the base says true)" in describe_training(args, base)
    model = make_adapter(base.folder, "v2_6")
    save(model, output)
    finish_adapter(model, output, base)
    write_run(args, base, output)
    return output


def test_an_adapter_carries_it(tiny, lora: Path) -> None:
    assert json.loads((lora / "adapter_config.json").read_text())["auto_mapping"]["use_image_id"] is False
    before, after = ((folder / PROCESSOR).read_text() for folder in (tiny("v2_6"), lora))
    assert after == before.replace('"use_image_id": true', '"use_image_id": false') != before
    assert "trained with use_image_id false" in (lora / "README.md").read_text()
    assert yaml.safe_load((lora / "run.yaml").read_text())["flags"]["use_image_id"] is False
    words = ["--model_name_or_path", str(tiny("v2_6")), "--data_path", "d", "--use_cpu", "true", "--use_lora", "true"]
    going_on = find_base(parse_arguments([*words, "--lora_weight_path", str(lora)]))
    assert "<image_id>" not in prompt(encoder(going_on))
    put(
        lora / "adapter_config.json",
        (lora / "adapter_config.json").read_text().replace('"use_image_id": false', '"use_image_id": "no"'),
    )
    with pytest.raises(CheckpointError, match="auto_mapping has use_image_id 'no'; it is true or false"):
        resolve_base(str(tiny("v2_6")), trained=lora)
    put(
        lora / "adapter_config.json",
        (lora / "adapter_config.json").read_text().replace('"use_image_id": "no"', '"use_image_id": false'),
    )


def test_chat_writes_the_prompt_of_training(tiny, lora: Path) -> None:
    session = ChatSession(None, [str(lora)], device="cpu")
    asked = ChatPromptOptions()
    used = {name: session._as_trained(name, asked).use_image_id for name in ("lora", OFF)}
    assert used == {"lora": False, OFF: True}
    talker = ChatPipeline(load_model(lora))
    assert "<image_id>" not in prompt(talker.encoder(asked))
    assert "<image_id>" in prompt(talker.encoder(ChatPromptOptions(use_image_id=True)))
    other = linked(lora, lora.parent / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    del config["auto_mapping"]["use_image_id"]
    put(other / "adapter_config.json", config)
    model: Any = load_model(lora)
    model.load_adapter(str(other), "other")
    with pytest.raises(ArgumentError, match=r"different use_image_id \(default: False, other: as the base\)"):
        ChatPipeline(model).encoder(asked)


def test_check_evaluate_and_export_follow(
    tiny, lora: Path, demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(demo_data / "eval.json")]
    lengths = {}
    for wish in ("true", "false"):
        assert main(["check", "--model", str(tiny("v2_6")), *words, "--use_image_id", wish]) == 0
        lengths[wish] = int(capsys.readouterr().out.partition("longest ")[2].partition(" ")[0])
    assert lengths["true"] - lengths["false"] == 3
    words += ["--limit", "1", "--max_new_tokens", "1", "--device", "cpu"]
    assert main(["evaluate", "--model", str(lora), "--out", str(tmp_path / "out"), *words]) == 0
    assert f"mode       use_image_id false ({lora}; the base says true)" in capsys.readouterr().out
    again = ["evaluate", "--model", str(lora), "--out", str(tmp_path / "out"), *words, "--use_image_id", "true"]
    assert main(again) == 2
    assert "use_image_id was None and is True" in capsys.readouterr().err
    target = tmp_path / "merged"
    assert main(["export", "--adapter_name_or_path", str(lora), "--export_dir", str(target)]) == 0
    said = capsys.readouterr().out
    assert "mode       use_image_id false" in said
    assert "verified=true" in said
    assert (target / PROCESSOR).read_bytes() == (lora / PROCESSOR).read_bytes()
    assert yaml.safe_load((target / "export.yaml").read_text())["use_image_id"] is False
    assert "use_image_id false in place of true" in (target / "README.md").read_text()
    other = linked(lora, tmp_path / "other")
    config = json.loads((lora / "adapter_config.json").read_text())
    config["auto_mapping"]["use_image_id"] = True
    put(other / "adapter_config.json", config)
    with pytest.raises(UserError, match="use_image_id .*: a model has one; choose it with --use_image_id"):
        export.resolve_sources(None, f"{lora},{other}")
    chosen = export.resolve_sources(None, f"{lora},{other}", None, True).base.image_ids
    assert chosen is not None
    assert chosen.used
