"""256 questions about images, answered in batches or by ``model.chat`` one by one: ``python benchmarks/evaluation.py``.

Ours is ``python -m finetune evaluate`` with batches of 8, scores and report included. The other side loads the model
and asks it one question after another: the published code (``--vendor PYTHON DIR``: an interpreter whose transformers
it runs with, such as 4.51.3, and a folder of the code files of MiniCPM-V 2.6), or our own ``model.chat`` without it.
The network is a tiny 2.6 in float32 with a vocabulary as large as the published one; greedy answers of 32 tokens. The
answers of both sides must be equal. The CPU seconds of the whole command count, one thread each; the sides take turns,
the medians of their runs count. Figures go to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results import Row, append
from startup import ROOT, cpu_seconds

sys.path.insert(0, str(ROOT))

QUESTIONS, BATCH, NEW_TOKENS = 256, 8, 32
# Of 16 questions: how many, width and height of their images.
KINDS = ((9, 640, 480), (2, 1344, 1344), (2, 1920, 1080), (3, 448, 300))
# Of the published config.json.
VOCABULARY = 151_666
_GOAL = 4.0


def prepare(folder: Path, code: Path | None) -> None:
    """Writes the network, with the published code files where there are any, the images and data.json."""
    import mix

    from finetune.tiny.checkpoint_writer import write_tiny_checkpoint

    _grow(write_tiny_checkpoint("v2_6", folder / "base"))
    for path in () if code is None else code.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == "resampler.py" and not re.search(r"import .*\bList\b", text):
            text = f"from typing import List\n{text}"  # a star import of torch below 2.13 had it
        (folder / "base" / path.name).write_text(text, encoding="utf-8")
    sizes = [(width, height) for count, width, height in KINDS for _ in range(count)]
    for number, size in enumerate(sizes):
        mix.photo(*size, number).save(folder / f"{number}.jpg", quality=90)
    records = []
    for number in range(QUESTIONS):
        question = f"what is {'in the corner of ' * (number % 7)}this, number {number}?"
        turns = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": "a red car"}]
        records.append({"id": str(number), "image": str(folder / f"{number % len(sizes)}.jpg"), "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")


def _grow(base: Path) -> None:
    """Gives a tiny checkpoint a vocabulary as large as the published one; its new tokens are made up."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel

    import finetune.models  # noqa: F401  registers the model class

    tokenizer = _changed(base / "tokenizer.json", {})
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    vocabulary |= {f"Ġw{number}": number for number in range(len(vocabulary), VOCABULARY)}
    _changed(base / "tokenizer.json", {"model": {**tokenizer["model"], "vocab": vocabulary}})
    _changed(base / "config.json", {"vocab_size": VOCABULARY})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModel.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    # As of the tiny checkpoint: token embeddings as large as image features, logits far apart.
    louder = {"llm.model.embed_tokens.weight": 10.0, "llm.lm_head.weight": 2.0}
    state = {name: (value * louder.get(name, 1.0)).contiguous() for name, value in state.items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})


def _changed(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a JSON file after some of its keys are set."""
    content = {**json.loads(file.read_text(encoding="utf-8")), **values}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return content


def our_words(folder: Path) -> list[str]:
    """Arguments of ``python -m finetune evaluate``."""
    words = ["--model", str(folder / "base"), "--data", str(folder / "data.json"), "--out", str(folder / "ours")]
    words += ["--batch_size", str(BATCH), "--max_new_tokens", str(NEW_TOKENS), "--metric", "exact", "--overwrite"]
    return [*words, "--device", "cpu"]


def our_answers(folder: Path) -> list[str]:
    """What ``evaluate`` has written, in the order of the questions."""
    lines = (folder / "ours/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["prediction"] for row in sorted(map(json.loads, lines), key=lambda row: row["index"])]


def chat_one_by_one(folder: Path) -> None:
    """Our own ``model.chat``, asked as the published code is."""
    from chat_side import ask_all

    from finetune.models import load_model, load_tokenizer

    model = load_model(folder / "base").eval()
    ask_all(model, load_tokenizer(folder / "base"), folder, NEW_TOKENS)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and appends the figures; 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vendor", nargs=2, metavar=("PYTHON", "DIR"), help="the published code, and what runs it")
    parser.add_argument("--runs", type=int, default=5, help="of each side")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    parser.add_argument("--chat", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.chat:
        chat_one_by_one(given.chat)
        return 0
    python, code = given.vendor or (None, None)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, code and Path(code))
        theirs = [sys.executable, __file__, "--chat", name]
        if python is not None:
            theirs = [python, str(Path(__file__).with_name("chat_side.py")), name, str(NEW_TOKENS)]
        sides = {"ours": [sys.executable, "-m", "finetune", "evaluate", *our_words(folder)], "theirs": theirs}
        # Of each side one run before is not counted, as it compiles and caches.
        for number in range(given.runs + 1):
            for side, command in sides.items():
                # The published code is copied to HF_HOME, and runs away from this project.
                place = folder if side == "theirs" and python else ROOT
                taken = cpu_seconds(command, place, {"HF_HOME": str(folder / "hf")})
                seconds[side] += [taken] if number else []
            compare(folder)
    whom = "our model.chat" if python is None else "the vendor's model.chat"
    ours, other = (statistics.median(seconds[side]) for side in ("ours", "theirs"))
    rows: list[Row] = [(f"evaluate, {QUESTIONS} questions, {whom} one by one", ours, other, other / ours, "CPU s")]
    print(f"{rows[0][0]}: {ours:.2f}, theirs {other:.2f} CPU s, {other / ours:.2f} times")
    if not given.dry:
        append("evaluation", rows, ["torch", "transformers", "pillow"])
    return 0 if other / ours >= _GOAL else 1


def compare(folder: Path) -> None:
    """Checks that both sides gave the same answers."""
    ours, theirs = our_answers(folder), json.loads((folder / "theirs.json").read_text(encoding="utf-8"))
    pairs = list(zip(ours, theirs, strict=True))
    apart = [number for number, (one, other) in enumerate(pairs) if one != other]
    assert not apart, f"{len(apart)} of {len(pairs)} answers differ; number {apart[0]}: {pairs[apart[0]]}"
    assert len(set(ours)) > len(ours) / 4, "nearly all answers are the same"


if __name__ == "__main__":
    sys.exit(main())
