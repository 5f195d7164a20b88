"""LLaMA-Factory side of llamafactory_samples.py: its data pipeline for MiniCPM-V 2.6, in an environment that has it.

    PYTHON benchmarks/llamafactory_side.py FOLDER PROCESSOR

FOLDER has data.json and a tokenizer; PROCESSOR is the published image_processing_minicpmv.py of the model, which
LLaMA-Factory runs. For every line "number" on standard input the record goes from files to a batch of one, once through
its template and once through its collator, and the milliseconds of CPU time are printed; for a line "number file" the
ids, labels, places and pixels are written to that file instead.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import gc
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TOKENS = {"im_start_id": "<image>", "im_end_id": "</image>", "slice_start_id": "<slice>", "slice_end_id": "</slice>"}
MAX_PIXELS = 768 * 768  # its default


def main() -> None:
    """Answers until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("processor", type=Path)
    given = parser.parse_args()
    records = json.loads((given.folder / "data.json").read_text(encoding="utf-8"))
    answers = sys.stdout
    sys.stdout = sys.stderr  # for whatever else is printed
    encode, collate, version = _sides(given.folder, given.processor)
    _prepared(records[0], encode, collate)
    gc.collect()
    gc.freeze()
    print(version, file=answers, flush=True)
    for line in sys.stdin:
        number, *file = line.split()
        start = time.process_time()
        batch = _prepared(records[int(number)], encode, collate)
        taken = 1000 * (time.process_time() - start)
        if file:
            _write(batch, file[0])
        print(taken, file=answers, flush=True)


def _sides(folder: Path, processor: Path) -> tuple[Any, Any, str]:
    import torch
    from llamafactory.data.collator import MultiModalDataCollatorForSeq2Seq  # pyright: ignore[reportMissingImports]
    from llamafactory.data.processor.supervised import (  # pyright: ignore[reportMissingImports]
        SupervisedDatasetProcessor,
    )
    from llamafactory.data.template import TEMPLATES  # pyright: ignore[reportMissingImports]
    from llamafactory.extras.env import VERSION  # pyright: ignore[reportMissingImports]
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(1)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    for name, token in TOKENS.items():
        setattr(tokenizer, name, tokenizer.convert_tokens_to_ids(token))
    spec = importlib.util.spec_from_file_location("image_processing_minicpmv", processor)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images = module.MiniCPMVImageProcessor(use_image_id=True, version=2.6)
    both = SimpleNamespace(
        image_processor=images, tokenizer=tokenizer, image_max_pixels=MAX_PIXELS, image_min_pixels=32 * 32
    )
    template = TEMPLATES["minicpm_v"]
    options = SimpleNamespace(mask_history=False, train_on_prompt=False, cutoff_len=1_000_000)
    encode = SupervisedDatasetProcessor(template=template, tokenizer=tokenizer, processor=both, data_args=options)
    collate = MultiModalDataCollatorForSeq2Seq(
        tokenizer=tokenizer, template=template, processor=both, label_pad_token_id=-100
    )
    return encode, collate, VERSION


def _prepared(record: dict[str, Any], encode: Any, collate: Any) -> Any:
    question, answer = record["conversations"]
    columns = {"_prompt": [[question]], "_response": [[answer]], "_system": [""], "_tools": [""]}
    columns |= {"_images": [[record["image"]]], "_videos": [None], "_audios": [None]}
    made = encode.preprocess_dataset(columns)
    return collate([{name: values[0] for name, values in made.items()}])


def _write(batch: Any, file: str) -> None:
    import numpy as np

    data = batch["data"]
    pixels: dict[str, Any] = {
        f"pixels{number}": np.asarray(each) for number, each in enumerate(data["pixel_values"][0])
    }
    np.savez(
        file,
        input_ids=batch["input_ids"][0].numpy(),
        labels=batch["labels"][0].numpy(),
        image_bound=data["image_bound"][0].numpy(),
        tgt_sizes=np.asarray(data["tgt_sizes"][0]),
        **pixels,
    )


if __name__ == "__main__":
    main()
