"""Worker of test_zero3.py: trains small models, alone or as a ZeRO-3 rank; writes results to ``--out``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore", category=FutureWarning)

import torch  # noqa: E402
from transformers import Trainer, TrainingArguments, set_seed  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from sound_batch import add_clips  # noqa: E402
from visual_batch import Row, make_batch, pack_rows, small_model  # noqa: E402

from finetune.models import MiniCPMO, MiniCPMV  # noqa: E402
from finetune.runtime.distributed import prepare_deepspeed_on_cpu  # noqa: E402
from finetune.runtime.outcome import exit_after_handlers  # noqa: E402

# Every vision tower and resampler; the audio tower with audio on one rank only.
FAMILIES = ("v2_0", "llama3_v2_5", "v4_5", "o2_6")
# Of these every rank packs its rows into one, while the process alone pads them.
PACKED = ("v4_5", "o2_6")
# And of these it recomputes layers and resampler.
RECOMPUTED = ("llama3_v2_5", "v4_5")

# Two rows per rank and step. Step 1: images of two sizes against text; 2: text against four items of three sizes;
# 3: text only, one rank without labels; 4: one item against two.
ROWS: list[Row] = [
    (3, [(4, 6)], 5), (2, [(3, 3)], 4), (6, [], 3), (4, [], 7),
    (5, [], 6), (6, [], 4), (3, [(2, 2), (5, 3), (5, 3)], 5), (2, [(1, 7)], 3),
    (4, [], 4), (3, [], 5), (7, [], 1), (2, [], 1),
    (3, [], 9), (4, [(6, 4)], 5), (2, [(3, 3)], 6), (5, [(2, 6)], 4),
]  # fmt: skip
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 1e6,
        "stage3_prefetch_bucket_size": 1e5,
        "stage3_param_persistence_threshold": 0,  # partition everything, however small
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


class InOrder(Trainer):
    def _get_train_sampler(self, *_, **__) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(ROWS)


def with_sound(batch: dict[str, torch.Tensor], rows: list[Row], model: MiniCPMV) -> dict[str, torch.Tensor]:
    """A short clip in every row with enough text in front, for a model with audio."""
    clips = [[5] if row[0] >= 5 else [] for row in rows]
    return add_clips(batch, clips, model.pool_step) if isinstance(model, MiniCPMO) and any(clips) else batch


def batch_of(rows: list[Row], model: MiniCPMV, *, packed: bool) -> dict[str, torch.Tensor]:
    if not packed:
        return with_sound(make_batch(rows, model.query_num), rows, model)
    return pack_rows([with_sound(make_batch([row], model.query_num), [row], model) for row in rows])


def train(family: str, out: Path, world: int) -> dict:
    set_seed(0)
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=4,
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=4 // world,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        prediction_loss_only=True,
        deepspeed=ZERO3 if world > 1 else None,
        use_cpu=True,
        gradient_checkpointing=world > 1 and family in RECOMPUTED,
        disable_tqdm=True,
    )
    if world > 1:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")  # before the model: else it is not partitioned
    model = small_model(family)
    if world > 1 and family == "v4_5":
        model.vision_batch = 1  # in a different number of chunks on every rank
    partitioned = sum(hasattr(parameter, "ds_shape") for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        if name in model.config.family.fixed_parameters:  # ZeRO-3 keeps what construction froze, plain loading does not
            parameter.requires_grad_(False)
    packed = world > 1 and family in PACKED
    trainer = InOrder(
        model=model,
        args=args,
        train_dataset=ROWS,  # pyright: ignore[reportArgumentType]
        eval_dataset=ROWS[:8],  # pyright: ignore[reportArgumentType]
        data_collator=lambda rows: batch_of(rows, model, packed=packed),
    )
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(out / family))
    history = [(entry["loss"], float(entry["grad_norm"])) for entry in trainer.state.log_history if "loss" in entry]
    return {"history": history, "eval_loss": evaluated, "partitioned": partitioned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        prepare_deepspeed_on_cpu()
    results = {family: train(family, out, world) for family in FAMILIES}
    if int(os.environ.get("RANK", "0")) == 0:
        (out / "results.json").write_text(json.dumps(results))
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    exit_after_handlers(0)
