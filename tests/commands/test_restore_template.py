"""python -m finetune restore-template on what the old scripts leave."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from finetune.__main__ import main
from finetune.encoding.chat_template_check import TemplateMismatchError, check_chat_template
from finetune.families import FAMILIES, by_name
from finetune.models import load_tokenizer

FAMILY = by_name("llama3_v2_5")
# What the old scripts put in place for training: no header of the answer at the end.
TRAINING = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)


@pytest.fixture
def old(tiny, tmp_path) -> Path:
    folder = shutil.copytree(tiny(FAMILY.name), tmp_path / "old")
    edit(folder, TRAINING)
    return folder


def edit(folder: Path, template: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))


def test_the_template_is_the_published_one():
    """As the assignment prints it, 348 characters."""
    digest = hashlib.sha256(FAMILY.inference_template.encode()).hexdigest()
    assert (len(FAMILY.inference_template), digest) == (
        348,
        "b48c47f6443892716176eb200bf4ef108f64e06ca26ed0fa8ebc0a4b3992fcb2",
    )
    assert [family.name for family in FAMILIES if family.inference_template] == [FAMILY.name]


def test_restored_once(old, capsys):
    before = (old / "tokenizer_config.json").read_bytes()
    with pytest.raises(TemplateMismatchError):
        check_chat_template(FAMILY, load_tokenizer(old))
    assert main(["restore-template", str(old)]) == 0
    assert "backups: tokenizer_config.json.bak" in capsys.readouterr().out
    after = (old / "tokenizer_config.json").read_bytes()
    settings = json.loads(after)
    assert settings == json.loads(before) | {"chat_template": FAMILY.inference_template}
    assert (old / "tokenizer_config.json.bak").read_bytes() == before
    assert check_chat_template(FAMILY, load_tokenizer(old))

    files = {path.name for path in old.iterdir()}
    assert main(["restore-template", str(old)]) == 0
    assert "nothing changed" in capsys.readouterr().out
    assert (old / "tokenizer_config.json").read_bytes() == after
    assert {path.name for path in old.iterdir()} == files


def test_every_backup_is_kept(old):
    assert main(["restore-template", str(old)]) == 0
    edit(old, "{{ 'another' }}")
    assert main(["restore-template", str(old)]) == 0
    assert "another" in (old / "tokenizer_config.json.bak2").read_text()
    assert "another" not in (old / "tokenizer_config.json.bak").read_text()


def test_a_template_in_a_file_of_its_own(old, capsys):
    (old / "chat_template.jinja").write_text(TRAINING)
    assert main(["restore-template", str(old)]) == 0
    assert "chat_template.jinja.bak" in capsys.readouterr().out
    assert load_tokenizer(old).chat_template == FAMILY.inference_template


def test_an_adapter(tiny, old, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny(FAMILY.name))}))
    for path in old.glob("tokenizer*"):
        shutil.copy(path, folder)
    assert main(["restore-template", str(folder)]) == 0
    assert load_tokenizer(folder).chat_template == FAMILY.inference_template


@pytest.mark.parametrize("family", ["v2_0", "v2_6", "v4_6"])
def test_other_families_are_left_alone(tiny, capsys, family):
    before = {path.name: path.read_bytes() for path in tiny(family).glob("*.json")}
    assert main(["restore-template", str(tiny(family))]) == 2
    assert f"is {by_name(family).title}: only" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tiny(family).glob("*.json")} == before


@pytest.mark.parametrize("missing", ["tokenizer_config.json", "config.json"])
def test_folders_of_something_else(old, capsys, missing):
    (old / missing).unlink()
    assert main(["restore-template", str(old)]) == 2
    assert missing in capsys.readouterr().err
