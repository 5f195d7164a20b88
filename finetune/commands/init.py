"""``python -m finetune init DIR``: a folder to start from: train.yaml with comments, data, README.md with the commands.

Without --images the data are two made-up records to be replaced. With --images and --answers they are your own: ANSWERS
is a CSV or TSV file with the columns image and answer, and question where images are asked different things.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from finetune.commands.parser import CommandParser
from finetune.families import FAMILIES, by_name
from finetune.utils.errors import UserError
from finetune.utils.file_types import is_file

METHODS = ("lora", "qlora", "full")
_SEED = 0


@dataclass(frozen=True, slots=True)
class Task:
    """Settings for a kind of task that differ from the launchers' defaults; docs/training.md has their reasons.

    Attributes:
        question: what an image is asked where the data do not say.
        max_slice_nums: most slices per image.
        model_max_length: longest sample in tokens.
        epochs: passes over the data.
        lora_r: rank of LoRA.
        metric: metric of the evaluation.
        why: one line for the comment.
    """

    question: str
    max_slice_nums: int = 9
    model_max_length: int = 2048
    epochs: int = 3
    lora_r: int = 64
    metric: str = "auto"
    why: str = "the launchers' defaults"


TASKS = {
    "vqa": Task("What is shown in this image?", metric="vqa"),
    "ocr": Task(
        "Read the text in this image.",
        model_max_length=4096,
        metric="cer",
        why="small print needs slices at full resolution, and long answers need tokens",
    ),
    "grounding": Task(
        "Where is <ref>the object</ref>?",
        metric="box_iou",
        why="boxes are text: small objects need slices at full resolution",
    ),
    "gui": Task(
        "Click the search field.",
        model_max_length=4096,
        metric="point_in_box",
        why="screenshots are large and their targets small: nine slices and room for their tokens",
    ),
    "classification": Task(
        "Which class is this? Answer with one word.",
        max_slice_nums=1,
        epochs=2,
        lora_r=16,
        metric="exact",
        why="one view of the image decides and the answer is short: one slice is several times faster",
    ),
}


def main(argv: list[str]) -> int:
    """Runs ``python -m finetune init``; 0 on success.

    Raises:
        UserError: the folder holds something, the answers file is not as described, or an image is missing.
    """
    given = build_parser().parse_args(argv)
    if (given.images is None) != (given.answers is None):
        raise UserError(
            "--images and --answers belong together: the folder of the images, and the table of their answers"
        )
    folder = given.dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; give another one")
    task = TASKS[given.task]
    question = given.question or task.question
    if given.answers is None:
        records = [_record(str(number), None, question, "The answer you want.") for number in range(2)]
    else:
        records = _from_table(given.answers, given.images, question)
    held_out = max(1, round(len(records) * given.eval_share)) if given.eval_share and len(records) > 1 else 0
    if held_out:
        random.Random(_SEED).shuffle(records)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train.json": records[held_out:], "eval.json": records[:held_out]}
    for name, part in parts.items():
        if part:
            (folder / name).write_text(json.dumps(part, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "train.yaml").write_text(_yaml(given, folder, task, bool(held_out)), encoding="utf-8")
    (folder / "README.md").write_text(_readme(given, folder, task, bool(held_out)), encoding="utf-8")
    print(f"{folder}: {len(parts['train.json'])} training and {held_out} evaluation records, train.yaml, README.md")
    print(f"next: python -m finetune check {folder / 'train.yaml'}")
    return 0


def _record(name: str, image: str | None, question: str, answer: str) -> dict[str, Any]:
    """A record in the official form; without an image one about text."""
    asked = question if image is None else f"<image>\n{question}"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": turns}


def _from_table(path: Path, images: Path, question: str) -> list[dict[str, Any]]:
    """Records of a table of answers; every image is looked for.

    Raises:
        UserError: no such file or column, a cell that is empty, or an image that is missing.
    """
    if not images.is_dir():
        raise UserError(f"--images {images}: no such folder")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--answers {path}: not a readable CSV file in UTF-8: {error}") from error
    columns = list(rows[0]) if rows else []
    if missing := {"image", "answer"} - set(columns):
        raise UserError(f"--answers {path}: no column {' and '.join(sorted(missing))}; its columns are {columns}")
    records = []
    for line, row in enumerate(rows, 2):
        name, answer = (row["image"] or "").strip(), (row["answer"] or "").strip()
        if not name or not answer:
            raise UserError(f"--answers {path}, line {line}: image and answer must not be empty")
        if not is_file(images / name):
            raise UserError(f"--answers {path}, line {line}: no image {name!r} in {images}")
        asked = (row.get("question") or "").strip() or question
        records.append(_record(f"{line - 2}", str((images / name).resolve()), asked, answer))
    return records


def _yaml(given: Any, folder: Path, task: Task, evaluated: bool) -> str:
    """train.yaml: every line that a user may want to change, and why it is what it is."""
    rate = "1.0e-5" if given.method == "full" else "1.0e-4"
    lines = [
        f"# {given.task} on {given.model}: {task.why}.",
        "#",
        f"#   python -m finetune check {folder / 'train.yaml'}    look at the data: --show 3, --html preview.html",
        f"#   python -m finetune train {folder / 'train.yaml'}    flags behind the file win: --learning_rate 2e-4",
        "",
        "### model: a hub id, or a folder",
        f"model_name_or_path: {json.dumps(_model(given.model))}",
        "",
        "### data",
        f"data_path: {json.dumps(str((folder / 'train.json').resolve()))}",
        *([f"eval_data_path: {json.dumps(str((folder / 'eval.json').resolve()))}"] if evaluated else []),
        f"model_max_length: {task.model_max_length} # longest sample in tokens, images included",
        f"max_slice_nums: {task.max_slice_nums} # most slices per image; fewer are faster and see less",
        "",
        "### method",
        *_method_lines(given.method, task),
        "gradient_checkpointing: true # less memory, a third more time",
        "",
        "### training",
        f"num_train_epochs: {task.epochs}",
        f"learning_rate: {rate}",
        "per_device_train_batch_size: 1",
        "gradient_accumulation_steps: 8",
        "lr_scheduler_type: cosine",
        "warmup_steps: 0.01 # below 1: a share of all steps",
        "weight_decay: 0.1",
        "",
        "### output",
        f"output_dir: {json.dumps(str((folder / 'output').resolve()))}",
        "save_steps: 0.1 # a share of all steps",
        "save_total_limit: 2",
        "resume_from_checkpoint: auto # start it again after an interruption, and it continues",
        *(["eval_strategy: steps", "eval_steps: 0.1"] if evaluated else []),
    ]
    return "\n".join(lines) + "\n"


def _method_lines(method: str, task: Task) -> list[str]:
    """What is trained."""
    if method == "full":
        return [
            "tune_llm: true",
            "tune_vision: true",
            "deepspeed: ds_config_zero3.json # weights divided by the GPUs",
        ]
    quantised = ["q_lora: true # 4 bit LLM: less memory, slower"] if method == "qlora" else []
    return ["use_lora: true", f"lora_r: {task.lora_r}", f"lora_alpha: {task.lora_r}", *quantised]


def _readme(given: Any, folder: Path, task: Task, evaluated: bool) -> str:
    file = folder / "train.yaml"
    output = folder / "output"
    steps = [
        ("Look at the data as the model will see it", f"python -m finetune check {file} --show 3"),
        ("What fits on your GPUs", f"python -m finetune plan {_model(given.model)} {folder / 'train.json'}"),
        ("Train; start it again after an interruption and it continues", f"python -m finetune train {file}"),
        ("Ask it", f"python -m finetune chat {'--model' if given.method == 'full' else '--adapter'} {output}"),
    ]
    if evaluated:
        base = _model(given.model) if given.method == "full" else "base"
        scored = f"python -m finetune evaluate --model {output} --data {folder / 'eval.json'}"
        steps.append(("Score it, and compare with the base", f"{scored} --metric {task.metric} --compare {base}"))
    if given.method != "full":
        merged = f"python -m finetune export --adapter_name_or_path {output} --export_dir {folder / 'merged'}"
        steps.append(("Merge the adapter into the model", merged))
    blocks = [
        f"{number}. {title}:\n\n   ```shell\n   {command}\n   ```\n" for number, (title, command) in enumerate(steps, 1)
    ]
    return f"# {given.task} with {given.model}\n\n" + "\n".join(blocks)


def _model(name: str) -> str:
    """The hub id of a generation, or the hub id or folder that was given.

    Raises:
        UserError: none of them.
    """
    known = {family.name for family in FAMILIES}
    if name in known:
        return by_name(name).hub_id
    if "/" not in name and not Path(name).is_dir():
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"--model {name}: no generation, no hub id OWNER/NAME and no folder here{hint}")
    return name


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(prog="python -m finetune init", description=__doc__)
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder to write; absent or empty")
    names = ", ".join(family.name for family in FAMILIES)
    parser.add_argument("--model", default="v2_6", help=f"a generation ({names}), a hub id or a folder (default: v2_6)")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--task", choices=list(TASKS), default="vqa", help="recommended settings (docs/training.md)")
    parser.add_argument("--images", type=Path, help="folder of images")
    parser.add_argument("--answers", type=Path, help="CSV or TSV: image, answer, perhaps question")
    parser.add_argument("--question", help="what every image is asked where the table does not say")
    parser.add_argument("--eval_share", type=float, default=0.1, help="of the records, held out (default 0.1; 0: none)")
    return parser
