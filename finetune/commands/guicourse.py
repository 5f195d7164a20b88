r"""``python -m finetune guicourse``: converts the GUICourse data sets; scores predictions by their published metrics.

convert: X_data.json with X_images.parquet of GUIEnv, GUIAct (web-single, web-multi, smartphone) and GUIChat become
X.json (records as training takes them), images/ and X_bad.jsonl (records that cannot be used, with the reason).
Run again, it writes only the missing images.

score: predictions are a JSON array or JSON Lines with uid and pred ("<box> 296 301 327 320</box>",
"actions:\ntap, <point> 500 970</point>"), or the predictions.jsonl of evaluate.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.commands.parser import CommandParser
from finetune.sample import DataError
from finetune.utils.errors import UserError

_DATA, _IMAGES = "_data.json", "_images.parquet"
_ACTS = ("web-single", "web-multi", "smartphone")
_MORE = 5


def main(argv: list[str]) -> int:
    """Run ``guicourse convert`` or ``guicourse score``; 0 when a record was converted, or the scores were printed."""
    given = build_parser().parse_args(argv)
    return convert(given) if given.what == "convert" else score(given)


def convert(given: argparse.Namespace) -> int:
    """Converts every data file named, or found in a folder.

    Raises:
        UserError: nothing to convert, or a file without its images.
    """
    files = [file for path in given.data for file in _data_files(path)]
    if given.images and len(files) > 1:
        raise UserError(
            "--images belongs to one data file; give one file, or remove --images and keep the published names"
        )
    done: list[dict[str, Any]] = []
    for file in files:
        parquets = given.images or [file.with_name(file.name.removesuffix(_DATA) + _IMAGES)]
        done += convert_file(file, parquets, given.out, form=given.boxes, original=given.original)
    if given.merge:
        _write_records(given.out / given.merge, done)
        print(f"{given.merge}: {len(done)} records")
    return 0 if done else 2


def convert_file(file: Path, parquets: Sequence[Path], out: Path, *, form: str, original: bool) -> list[dict[str, Any]]:
    """Converts one published file; returns the records written.

    Raises:
        DataError: a file is missing or is not what it should be.
    """
    from finetune.data_files.records import open_records
    from finetune.guicourse.images import extract
    from finetune.guicourse.record_conversion import RecordError, image_ids, to_training

    stem = file.name.removesuffix(_DATA) if file.name.endswith(_DATA) else file.stem
    usable, bad = _look(file, open_records(file))
    wanted = {image for _, record, _ in usable for image in image_ids(record)}
    if not usable:
        raise DataError(f"{file}: no record of GUIEnv, GUIAct or GUIChat; the first {bad[0]['message']}")
    name = usable[0][2]
    act = next((act for act in _ACTS if stem.startswith(act)), stem)
    folder = Path("images") / name / act if name == "guiact" else Path("images") / name
    found, faults = extract(parquets, wanted, out / folder, original=original)
    paths = {image: path.relative_to(out).as_posix() for image, path in found.items()}
    converted = []
    for index, record, _ in usable:
        try:
            if fault := next((faults[image] for image in image_ids(record) if image in faults), None):
                raise RecordError(fault)
            converted.append(to_training(record, paths, form))
        except RecordError as error:
            bad.append(_bad(file, index, record, error))
    _write(out, stem, converted, bad)
    print(f"{file.name}: {len(converted)} records, {len(paths)} images in {out / folder}")
    for row in bad[:_MORE]:
        print(f"  skipped: record {row['record']} ({row['uid']}): {row['message']}")
    if bad:
        print(f"  {len(bad)} skipped; all are listed in {out / f'{stem}_bad.jsonl'}")
    return converted


def _look(file: Path, records: Sequence[Any]) -> tuple[list[tuple[int, dict[str, Any], str]], list[dict[str, Any]]]:
    """(position, record, data set) of the recognised records, and the errors of the others."""
    from finetune.guicourse.record_conversion import RecordError, image_ids, kind

    usable, bad = [], []
    for index, record in enumerate(records):
        try:
            if not isinstance(record, dict):
                raise RecordError("is not an object")
            image_ids(record)
            usable.append((index, record, kind(record)))
        except RecordError as error:
            bad.append(_bad(file, index, record, error))
    return usable, bad


def score(given: argparse.Namespace) -> int:
    """Prints the table of scores of a prediction file, and writes it where asked.

    Raises:
        UserError: labels or predictions that cannot be scored.
    """
    from finetune.data_files.records import open_records
    from finetune.guicourse.actions import ActionError
    from finetune.guicourse.gui_scores import ElementsMissingError, score_file
    from finetune.guicourse.images import elements

    labels = open_records(given.data)
    for index, record in enumerate(labels):
        if not isinstance(record, dict) or not {"uid", "image_size"} <= record.keys():
            raise DataError(f"{given.data}, record {index}: needs uid and image_size; give the published *_data.json")
        if "task_type" not in record and "actions_label" not in record:
            raise DataError(f"{given.data}, record {index}: has no label of GUIEnv or GUIAct (GUIChat has no scores)")
    predictions = read_predictions(given.pred)
    parquets = given.images
    beside = given.data.with_name(given.data.name.removesuffix(_DATA) + _IMAGES)
    if not parquets and beside.is_file():
        parquets = [beside]
    # Taps and texts need no page elements, and the files are large.
    on_elements = {record["image_id"] for record in labels if "'element'" in str(record.get("actions_label"))}
    pages = elements(parquets, on_elements) if parquets and on_elements else None
    try:
        scores = score_file(labels, predictions, pages, given.position)
    except ElementsMissingError as error:
        raise UserError(f"{error}: give the published Parquet file of {given.data.name} with --images") from error
    except ActionError as error:
        raise DataError(f"{given.data}: a label {error}") from error
    print(table(scores))
    if unknown := len(predictions.keys() - {record["uid"] for record in labels}):
        print(f"{unknown} predictions match no sample and are ignored")
    if given.out:
        given.out.write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def read_predictions(path: Path) -> dict[str, dict[str, Any]]:
    """Predictions by uid; the last one wins when a uid repeats.

    Raises:
        DataError: one without uid (or id) and pred (or prediction).
    """
    from finetune.data_files.records import open_records

    found = {}
    for index, row in enumerate(open_records(path)):
        if isinstance(row, dict) and "prediction" in row and "pred" not in row:
            row = {**row, "uid": row.get("id"), "pred": row["prediction"]}
        if not isinstance(row, dict) or not isinstance(row.get("uid"), str) or not isinstance(row.get("pred"), str):
            raise DataError(f"{path}, record {index}: needs 'uid' and 'pred', both strings; it is {str(row)[:80]}")
        found[row["uid"]] = row
    return found


def table(scores: dict[str, Any]) -> str:
    """The scores as text: the means, then a line per action."""
    lines = [f"{name:<14} {value:d}" for name, value in scores.items() if isinstance(value, int)]
    lines += [f"{name:<14} {value:.4f}" for name, value in scores.items() if isinstance(value, float)]
    if "actions" in scores:
        lines.append(f"{'action':<16} {'count':>6} {'named':>8} {'success':>8} {'score':>8}")
        lines += [
            f"{name:<16} {row['count']:>6} {row['named']:>8.4f} {row['success']:>8.4f} {row['score']:>8.4f}"
            for name, row in scores["actions"].items()
        ]
    return "\n".join(lines)


def _data_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob(f"*{_DATA}"))
    if not found:
        raise UserError(f"{path}: no file there is named *{_DATA}; give the files of the published data sets")
    return found


def _bad(file: Path, index: int, record: Any, error: ValueError) -> dict[str, Any]:
    uid = record.get("uid") if isinstance(record, dict) else None
    return {"file": str(file), "record": index, "uid": uid, "message": str(error)}


def _write(out: Path, stem: str, converted: list[dict[str, Any]], bad: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _write_records(out / f"{stem}.json", converted)
    list_of_bad = out / f"{stem}_bad.jsonl"
    list_of_bad.unlink(missing_ok=True)
    if bad:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in sorted(bad, key=lambda row: row["record"]))
        list_of_bad.write_text("".join(lines), encoding="utf-8")
    twice = [uid for uid, count in Counter(record["id"] for record in converted).items() if count > 1]
    if twice:
        print(f"  {len(twice)} uids occur more than once, e.g. {twice[0]}")


def _write_records(path: Path, records: list[dict[str, Any]]) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        prog="python -m finetune guicourse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="convert|score")
    conversion = commands.add_parser("convert", help="published files to training data")
    conversion.add_argument("--data", required=True, nargs="+", type=Path, help="*_data.json files, or their folder")
    conversion.add_argument("--images", nargs="+", type=Path, help="Parquet files (default: X_images.parquet beside)")
    conversion.add_argument("--out", required=True, type=Path, help="folder to write")
    conversion.add_argument(
        "--boxes", choices=["parentheses", "plain"], default="parentheses", help="(x1,y1),(x2,y2) or x1 y1 x2 y2"
    )
    conversion.add_argument("--merge", help="also write all records of this call into one file of this name")
    conversion.add_argument("--original", action="store_true", help="keep the image files as published, not PNG")
    scoring = commands.add_parser("score", help="the published scores of a prediction file")
    scoring.add_argument("--data", required=True, type=Path, help="published test file, *_data.json")
    scoring.add_argument("--pred", required=True, type=Path, help="predictions")
    scoring.add_argument("--images", nargs="+", type=Path, help="its Parquet file, with the page elements of web data")
    scoring.add_argument(
        "--position",
        choices=["absolute", "related", "related_version1", "related_version2"],
        help="unit of predictions that name none (default: thousandths, or fractions where all are within 0 to 1)",
    )
    scoring.add_argument("--out", type=Path, help="JSON file for all scores")
    return parser
