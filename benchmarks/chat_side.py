"""The other side of evaluation.py: ``model.chat`` of the published code, one question after another.

It is started by evaluation.py in an environment of its own, so nothing of this project is imported here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image


def ask_all(model: Any, tokenizer: Any, folder: Path, new_tokens: int) -> None:
    """Asks every question of data.json and writes theirs.json, the greedy answers."""
    answers = []
    for record in json.loads((folder / "data.json").read_text(encoding="utf-8")):
        image = Image.open(record["image"]).convert("RGB")
        question = record["conversations"][0]["content"].removeprefix("<image>\n")
        # As a greedy answer is asked of the published code, whose default without sampling is beam search.
        options = {"sampling": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": new_tokens}
        turns = [{"role": "user", "content": [image, question]}]
        answers.append(model.chat(image=None, msgs=turns, tokenizer=tokenizer, **options).strip())
    (folder / "theirs.json").write_text(json.dumps(answers), encoding="utf-8")


def main() -> None:
    """Loads the published code as its model card says, and asks it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("new_tokens", type=int)
    given = parser.parse_args()
    import torch
    from transformers import AutoModel, AutoTokenizer

    base = str(given.folder / "base")
    model = AutoModel.from_pretrained(
        base, trust_remote_code=True, attn_implementation="sdpa", torch_dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    ask_all(model.eval(), tokenizer, given.folder, given.new_tokens)


if __name__ == "__main__":
    main()
