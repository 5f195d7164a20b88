"""What all messages of the project have in common: flags that exist, and nothing that steers a terminal."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from finetune.arguments.data import DataArguments
from finetune.arguments.model import LoraArguments, ModelArguments
from finetune.arguments.training import TrainingArguments
from finetune.sample import DataError, Media, Source
from finetune.utils.errors import UserError
from finetune.utils.quoting import plain, shown, truncate_middle, words_of

ROOT = Path(__file__).resolve().parents[2]
FILES = [*sorted((ROOT / "finetune").rglob("*.py")), *ROOT.glob("*.py")]
# Options of other programs that messages tell users to call.
FOREIGN = {
    "shm-size",
    "ipc",
    "no-build-isolation",
    "enable-lora",
    "lora-modules",
    "max-lora-rank",
    "trust-remote-code",
    "nproc_per_node",
}
# Of DeepSpeed's converter.
FOREIGN |= {"shm-size", "ipc", "no-build-isolation"}
# Of the scripts and programs of llama.cpp, of cmake, and of hf upload.
FOREIGN |= {"build", "target", "jinja", "chat-template-kwargs", "mmproj", "no-mtp", "outfile", "outtype", "output-dir"}
FOREIGN |= {"image-mean", "image-std", "use-f32", "minicpmv-projector", "minicpmv_version", "exclude"}
FOREIGN |= {"input_folder", "output_folder", "inject_missing_state", "num_extract_workers", "num_merge_workers"}


def known_flags() -> set[str]:
    """Those of training, and whatever a command of this project declares."""
    found = {
        entry.name
        for each in (ModelArguments, DataArguments, LoraArguments, TrainingArguments)
        for entry in fields(each)
    }
    for path in FILES:
        found |= set(re.findall(r'add_argument\(\s*f?"--([\w-]+)"', path.read_text(encoding="utf-8")))
    from finetune.arguments.data import VIDEO_FLAGS

    return found | set(VIDEO_FLAGS) | {"help", "config"}


def words(path: Path) -> list[str]:
    """The texts of a source file, without its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    doc = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in doc
    ]


def test_messages_name_flags_that_exist() -> None:
    known, unknown = known_flags(), set()
    for path in FILES:
        for text in words(path):
            for flag in re.findall(r"(?<![\w-])--([a-z]\w*(?:-\w+)*)", text):
                # The name of a part goes on behind --tune_.
                begun = flag.endswith("_") and any(name.startswith(flag) for name in known)
                if flag not in known | FOREIGN and not begun:
                    unknown.add((path.name, flag))
    assert unknown == set()


def test_no_message_names_a_flag_without_its_dashes() -> None:
    """As "raise max_pixels" once did: no such flag."""
    for path in FILES:
        for text in words(path):
            assert not re.search(r"\b(raise|lower|pass|give) max_pixels\b", text), path.name


def test_what_records_hold_never_steers_a_terminal() -> None:
    strange = "a\x1b[31mb\x9b1m\u202ec\x07\ud83d"
    source = Source(f"{strange}.json", 3, strange)
    media = Media("image", Path(strange))
    for text in (
        str(source),
        str(media),
        str(UserError(strange)),
        str(DataError(f"{source}: {media}")),
        shown(strange),
    ):
        assert text.isprintable()
        text.encode()
    assert plain("a\nb\tc \u3000 é 图") == "a\nb\tc \u3000 é 图"
    assert len(str(Source("a.json", 0, "x" * 10**6))) < 300
    assert len(str(Media("image", Path("x" * 10**4)))) < 500
    assert len(words_of(["x" * 1000] * 1000)) < 1500
    assert truncate_middle("a" * 300) == "a" * 300


@pytest.mark.parametrize("value", [[[[[[[[[]]]]]]]], {"a": {"b": "c" * 1000}}, 10**1000, "x" * 1000])
def test_values_are_shown_short(value: object) -> None:
    assert len(shown(value, 60)) < 120
