import json
import re
from pathlib import Path

import pytest

from finetune.data_files import json_scan
from finetune.data_files.records import open_records
from finetune.sample import DataError

RECORDS = [{"id": "0", "text": "a\u2028b"}, {"id": "1"}]
README = """
  [
    {
      "id": "0",
      "image": 'path/to/image_0.jpg',
      "conversations": [
            {
              'role': 'user', 
              'content': '<image>\\nHow many desserts are on the white plate?'
            }, 
        ]
    },
  ]
"""  # noqa: W291


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.json"


@pytest.mark.parametrize("lead", ["", "\n \n", "\ufeff", "\ufeff\n"])
def test_arrays_and_lines(file: Path, lead: str) -> None:
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
    for text in (json.dumps(RECORDS, indent=2), lines, lines + "\n\n", lines.replace("\n", "\r\n")):
        file.write_bytes((lead + text).encode())
        assert list(open_records(file)) == RECORDS


BAD: list[tuple[str | bytes, str]] = [
    (README, r", line 5: not valid JSON: JSON needs double quotes, not single ones: 'path/to/image_0.jpg'"),
    (README.replace("'", '"'), r", line 10: not valid JSON: trailing comma before ']'; remove the comma"),
    ('[\n{"a": 1,\n\n}]', r", line 2: not valid JSON: trailing comma before '}'"),
    ('[{"a": 1}, ]', ", line 1: not valid JSON: trailing comma before ']'"),
    ("[{'a': 1}]", ", line 1: not valid JSON: JSON needs double quotes"),
    ('{"a": 1}\n{"a": 1,}', ", line 2: not valid JSON: trailing comma before '}'"),
    ('{"a": 1}\n\n{"a": \'b\'}', ", line 3: not valid JSON: JSON needs double quotes"),
    ('{\n"a": 1\n}', ", line 1: one object over several lines"),
    ('{"a": 1}\n{"a":\n1}', ", line 2: not valid JSON: the line ends in the middle of a record"),
    ('{"a": 1} {"a": 2}', ", line 1: not valid JSON: Extra data at {"),
    ('[{"a": 1}]\n\n[{"a": 2}]', ", line 3: not valid JSON: Extra data at "),
    ("[1, 2, 34", ", line 1: .*the file ends in the middle of a record"),
    ('[{"a": "x', ", line 1: not valid JSON: the file ends in the middle of a record"),
    ('[{"a": "x"},\n{"b": "\\q"}]', ", line 2: not valid JSON: Invalid \\\\escape"),
    ("[" * 100_000, "a record is nested too deeply"),
    ('[{"a": None}]', "None.* is Python syntax; JSON has null"),
    ('[\n// first\n{"a": 1}]', ", line 2: not valid JSON: JSON has no comments"),
    ('[{"a": 1}', ", line 1: .*the file ends in the middle of a record"),
    ('[{"a": 1} {"a": 2}]', """line 1: not valid JSON: Expecting ',' delimiter at {"a": 2}"""),
    ('[{"a": "x\ny"}]', ", line 1: not valid JSON: Invalid control character"),
    ("", "the file is empty"),
    ("[]", "the array has no record"),
    ("\n\nid,image\n", "line 3: starts with 'i'; expected a JSON array"),
    ("[\u00e9]".encode("latin-1"), "not UTF-8 at byte 1; save the file as UTF-8"),
]


@pytest.mark.parametrize("block", [1, 7, json_scan._BLOCK])
@pytest.mark.parametrize(("content", "message"), BAD)
def test_bad_files(file: Path, content: str | bytes, message: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_scan, "_BLOCK", block)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(str(file)) + ".*" + message.replace("{", r"\{")):
        open_records(file)


def test_no_file(file: Path) -> None:
    with pytest.raises(DataError, match=r"data.json: no such data file \(looked in .*\); correct the path"):
        open_records(file)
    with pytest.raises(DataError, match="the folder has no data file; supported are .json, .jsonl, .json.gz"):
        open_records(file.parent)
    (file.parent / "a.jpg").touch()
    with pytest.raises(DataError, match=f"for a folder of images: python -m finetune init DIR --images {file.parent}"):
        open_records(file.parent)
