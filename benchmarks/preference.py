"""Cost of a step of preference training (DPO) over a supervised step on the same tokens, in operations and in time.

    python benchmarks/preference.py [--dry] [--pairs 8]

Both train LoRA on a tiny MiniCPM-V 2.6 on a CPU. The supervised step has both answers of every pair as two samples with
an image each; that of preference training has the reference from the cache, or runs the model once more without its
adapter. Goals: at most 1.1 times a supervised step with the cache, 1.55 times without.

The last cases are a step of a small 4.6 with the vocabulary of the published one, against the way of TRL 1.16 on the
class of transformers: both answers as rows with pixels of their own, the logits of every token, and the reference in
every step with the adapter off. Goal: 1.6 times its speed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from results import Row, append
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, MiniCPMV4_6ForConditionalGeneration

from dataset import DataCollator
from finetune.arguments.preference import PreferenceOptions
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import Encoder
from finetune.encoding.example import Example
from finetune.encoding.length_policy import LengthPolicy
from finetune.models import load_model, load_tokenizer
from finetune.sample import Media, Message, Sample, Source, Text
from finetune.tiny.checkpoint_writer import write_tiny_checkpoint
from finetune.training.preference_loss import pair_figures

FAMILY = "v2_6"
STOCK_PAIRS = 2  # 4 rows of logits: 1.6 GB
STOCK, VOCABULARY = "v4_6", 248_320
ROUNDS = 5
WORDS = 40


def examples_of(encoder: Encoder, count: int, *, image: bool) -> list[Example]:
    """Encoded pairs; their answers have WORDS words."""
    media = (Media("image", Image.effect_noise((224, 112), 80).convert("RGB")),) if image else ()
    question = Message("user", (*media, Text("What is it? " * WORDS)))
    better, worse = (Message("assistant", (Text(word * WORDS),), train=True) for word in ("a dog ", "the cat "))
    sample = Sample("0", Source("memory", 0), (question, better), rejected=worse)
    return [LengthPolicy(encoder).encode(sample)[0]] * count


def steps(model: Any, examples: Sequence[Example], pad_id: int) -> dict[str, Callable[[], None]]:
    """Forward and backward pass of each way."""
    paired, plain = DataCollator(pad_id, pairs=True)(examples), []
    for example in examples:
        assert example.rejected is not None
        plain += [example, replace(example.rejected, borrows_media=False)]
    single = DataCollator(pad_id)(plain)
    for batch in (paired, single):
        batch.pop("sources")
    paired.pop("pair_weights")

    def logps() -> torch.Tensor:
        with torch.no_grad():
            return -model(**paired).row_loss[:, 0].view(2, -1).T

    known = logps()

    def preferred(reference: torch.Tensor) -> None:
        rows = model(**paired, row_graph=True).row_loss
        pair_figures(rows, reference, PreferenceOptions()).loss.mean().backward()

    def switched_off() -> None:
        with model.disable_adapter():
            reference = logps()
        preferred(reference)

    return {
        "supervised": lambda: model(**single).loss.backward(),
        "cached": lambda: preferred(known),
        "adapter_off": switched_off,
    }


def way_of_trl(model: Any, examples: Sequence[Example], pad_id: int) -> Callable[[], None]:
    """Forward and backward pass as TRL 1.16 does them: rows of all chosen answers, then of all rejected ones."""
    rows = [replace(each, rejected=None) for each in examples]
    rows += [replace(each.rejected, borrows_media=False) for each in examples if each.rejected is not None]
    batch = DataCollator(pad_id)(rows)
    labels = batch.pop("labels")[:, 1:]
    batch.pop("sources")

    def logps() -> torch.Tensor:
        logits = model(**batch).logits[:, :-1].float()
        found = torch.gather(logits.log_softmax(-1), 2, labels.clamp(min=0)[..., None])[..., 0]
        return (found * (labels >= 0)).sum(1)

    def step() -> None:
        with torch.no_grad(), model.disable_adapter():
            reference = logps().view(2, -1)
        (better, worse), (known, other) = logps().view(2, -1), reference
        (-torch.nn.functional.logsigmoid(0.1 * ((better - known) - (worse - other)))).mean().backward()

    return step


def against_trl(folder: Path, pairs: int) -> list[Row]:
    """The cases of a vocabulary of the published size."""
    tiny = write_tiny_checkpoint(STOCK, folder / "small")
    base = resolve_base(str(tiny))
    config = AutoConfig.from_pretrained(tiny)
    config.text_config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    stock = MiniCPMV4_6ForConditionalGeneration(config)  # pyright: ignore[reportArgumentType]
    stock.float()
    stock.save_pretrained(folder / "stock")
    for file in tiny.iterdir():
        if file.suffix != ".safetensors" and not (folder / "stock" / file.name).exists():
            shutil.copy(file, folder / "stock")
    encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings)
    settings = LoraConfig(r=8, target_modules=base.family.lora_targets["llm"])
    examples = examples_of(encoder, pairs, image=True)
    theirs = seconds(way_of_trl(get_peft_model(stock, settings).train(), examples, encoder.pad_id))
    model = get_peft_model(load_model(folder / "stock", dtype=torch.float32), settings).train()  # pyright: ignore
    made, rows = steps(model, examples, encoder.pad_id), []
    for name in ("cached", "adapter_off"):
        ours = seconds(made[name])
        case = f"step of preference training, {name}, {STOCK} of {VOCABULARY} tokens, TRL's way"
        rows.append((case, ours, theirs, theirs / ours, "CPU seconds, theirs / ours"))
        print(f"{case:<84} {theirs / ours:6.2f}")
    return rows


def operations(step: Callable[[], None]) -> float:
    """Operations of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def seconds(step: Callable[[], None]) -> float:
    """CPU seconds of a step: the least of ROUNDS."""
    step()
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        step()
        found.append(time.process_time() - start)
    return min(found)


def main(*, dry: bool, pairs: int) -> None:
    """Prints the cases and adds them to results.csv."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        base = resolve_base(str(write_tiny_checkpoint(FAMILY, Path(folder) / "model")))
        encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings)
        settings = LoraConfig(r=8, target_modules=base.family.lora_targets["llm"])
        model = get_peft_model(load_model(base.folder, dtype=torch.float32), settings).train()  # pyright: ignore
        for what in ("image", "text"):
            made = steps(model, examples_of(encoder, pairs, image=what == "image"), encoder.pad_id)
            for measure, unit in ((operations, "operations"), (seconds, "CPU seconds")):
                found = {name: measure(step) for name, step in made.items()}
                for name in ("cached", "adapter_off"):
                    ratio = found[name] / found["supervised"]
                    case = f"step of preference training, {name}, {what}, {unit}"
                    rows.append((case, found[name], found["supervised"], ratio, f"{unit}, preference / supervised"))
                    print(f"{case:<84} {ratio:6.2f}")
        rows += against_trl(Path(folder), min(pairs, STOCK_PAIRS))
    if not dry:
        append("preference", rows, ("torch", "transformers", "peft"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="do not write results.csv")
    parser.add_argument("--pairs", type=int, default=8)
    given = parser.parse_args()
    main(dry=given.dry, pairs=given.pairs)
