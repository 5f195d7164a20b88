"""The flags about the checkpoint, the data and the adapters; those about training are in ``arguments``."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from finetune.errors import ArgumentError
from finetune.media.sampling import VideoOptions

logger = logging.getLogger(__name__)

VIDEO_FLAGS = (
    "video_fps",
    "video_max_frames",
    "video_max_slice_nums",
    "video_max_pixels",
    "video_packing",
    "packing_maxlen",
    "enable_high_fps",
    "double_frame_duration",
    "time_scale",
)
"""The flags that say how videos are looked at."""


@dataclass
class ModelArguments:
    """Which checkpoint is trained."""

    model_name_or_path: str = field(
        metadata={"help": "Folder of the checkpoint, or its hub id (a hub id is downloaded)."}
    )
    llm_type: str | None = field(
        default=None,
        metadata={"help": "Only checked: the family is read from the checkpoint; a wrong value is corrected."},
    )
    template: str | None = field(
        default=None, metadata={"help": "Only checked, as llm_type: LLaMA-Factory's name for a prompt format."}
    )
    print_param_status: bool = field(
        default=False, metadata={"help": "List every parameter with its shape, type and whether it is trained."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa (default), flash_attention_2 or eager, for vision tower and LLM."}
    )
    use_hub_kernels: bool = field(
        default=False,
        metadata={
            "help": "4.6, 4.7: the kernels of linear attention from transformers' mapping on the hub, in place of "
            "installed ones (pip install -e '.[hub-kernels]', a GPU). Downloads and runs code, so it is off by default."
        },
    )
    downsample_mode: str | None = field(
        default=None,
        metadata={
            "help": "4.6 and later: 16x or 4x, how many vision patches become a token; 4x sees finer detail and takes "
            "about four times the tokens per image. Default: DOWNSAMPLE_MODE in the environment, else the adapter's or "
            "the checkpoint's."
        },
    )
    check_base_loss: str = field(
        default="auto",
        metadata={
            "help": "auto stops at step 0 when a pretrained checkpoint has a loss near ln(vocabulary); off does not.",
            "choices": ["auto", "off"],
        },
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str | None = field(
        default=None, metadata={"help": "Training data: a file (json, jsonl, parquet, arrow, csv) or a folder of them."}
    )
    eval_data_path: str | None = field(default=None, metadata={"help": "Evaluation data, in the same forms."})
    data_format: Literal["auto", "official", "sharegpt", "alpaca", "openai"] = field(
        default="auto", metadata={"help": "Form of the records of data_path; auto looks at the first ones and says it."}
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Names of data sets in dataset_dir/dataset_info.json, separated by commas, instead of data_path. "
            "a:0.3 takes a random 30 percent of a, a:2 every record of a twice per epoch."
        },
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    dataset_dir: str = field(default="data", metadata={"help": "Folder of dataset_info.json and its files."})
    media_dir: str | None = field(
        default=None, metadata={"help": "Folder that media paths of dataset are relative to. Default: dataset_dir."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "At most so many records of every data set."})
    val_size: float = field(
        default=0.0,
        metadata={"help": "Part of the training data kept for evaluation: a share below 1, or a number of records."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read parquet and jsonl from front to back instead of at random; needs max_steps."},
    )
    buffer_size: int = field(default=16384, metadata={"help": "Records that streaming draws from at random."})
    overwrite_cache: bool = field(
        default=False, metadata={"help": "Index the data files and measure the samples anew."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that relative image paths may also be relative to."}
    )
    strict_paths: bool = field(
        default=False,
        metadata={
            "help": "Refuse records with media outside of the folder of their data file, image_root and media_dir "
            "(links are followed): for data from elsewhere."
        },
    )
    train_on: Literal["all", "last"] = field(
        default="all",
        metadata={
            "help": "Assistant turns that carry loss: all, or only the last of a conversation. A message with "
            '"loss": 0 carries none either way.',
        },
    )
    thinking: Literal["keep", "mask", "strip"] = field(
        default="keep",
        metadata={
            "help": "What becomes of <think>...</think> in answers, for models that think: keep it and train on it, "
            "mask it (kept without loss), or strip it. An empty block never carries loss.",
        },
    )
    max_slice_nums: int | None = field(
        default=None, metadata={"help": "Most slices per image. Default: the checkpoint's value."}
    )
    max_image_pixels: int | None = field(
        default=None, metadata={"help": "Largest image accepted, in pixels (guards against decompression bombs)."}
    )
    image_max_pixels: int | None = field(
        default=None,
        metadata={"help": "Larger images are shrunk to so many pixels before they are cut. Default: none is."},
    )
    image_backend: Literal["pillow", "fast"] = field(
        default="pillow",
        metadata={
            "help": "How images are resized: pillow, to the bit as Pillow and with it the published code; or fast, by "
            "torch's kernel for bytes, with about 0.2 percent of the bytes (at most 1 in noise) one level off, and "
            "JPEG files decoded by simplejpeg where it is installed. 4.6, 4.7 and OCR have their own way and refuse it."
        },
    )
    video_fps: float | None = field(
        default=None,
        metadata={"help": "Frames per second of videos; of a folder of frames, the rate it has. Default: 1, of 4.5 3."},
    )
    video_max_frames: int | None = field(
        default=None,
        metadata={
            "help": "Most frames of a video. Default: 64; of 4.5 180 groups, of 4.6, 4.7 and OCR the checkpoint's 128."
        },
    )
    video_max_slice_nums: int | None = field(
        default=None,
        metadata={"help": "Most slices per frame. Default: 1, of 4.6, 4.7 and OCR the checkpoint's value."},
    )
    video_max_pixels: int | None = field(
        default=None,
        metadata={"help": "Larger frames are shrunk to so many pixels before they are cut. Default: none is."},
    )
    video_packing: int | None = field(
        default=None, metadata={"help": "Frames per group, for 4.5. Default: 1, more for long videos."}
    )
    packing_maxlen: int | None = field(default=None, metadata={"help": "Most frames per group, for 4.5. Default: 3."})
    enable_high_fps: bool = field(
        default=False, metadata={"help": "Short videos are sampled twice as densely, two frames to a group, for 4.5."}
    )
    double_frame_duration: float | None = field(
        default=None, metadata={"help": "Seconds below which enable_high_fps takes a video for short. Default: 30."}
    )
    time_scale: float | None = field(
        default=None, metadata={"help": "Seconds per time index of a packed frame, for 4.5. Default: 0.1."}
    )
    overlong: str = field(
        default="shrink",
        metadata={
            "help": "Samples above model_max_length: shrink cuts their images into fewer slices, then drops the oldest "
            "turns; truncate shortens prompt text, then drops turns; drop leaves the sample out; error stops.",
            "choices": ["shrink", "drop", "truncate", "error"],
        },
    )
    on_bad_sample: str = field(
        default="error",
        metadata={
            "help": "Records that cannot be used: error stops; skip leaves them out and lists them in "
            "OUTPUT_DIR/bad_samples.jsonl.",
            "choices": ["error", "skip"],
        },
    )
    max_bad_share: float = field(
        default=0.1,
        metadata={
            "help": "With on_bad_sample skip: the run stops, with status 4, when more than this share of the samples "
            "cannot be used. Samples that are only too long do not count. 1 never stops."
        },
    )
    check: str | None = field(
        default=None,
        metadata={
            "help": "Records looked at before step 1: full, sample (1000 of them) or off. Default: full up to 20000.",
            "choices": ["full", "sample", "off"],
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            raise ArgumentError(f"--max_bad_share {self.max_bad_share}: it is a share, from 0 to 1")

    @property
    def video_options(self) -> VideoOptions:
        """How videos are looked at; what is not given keeps the checkpoint's value."""
        return VideoOptions(
            fps=self.video_fps,
            max_frames=self.video_max_frames,
            max_slice_nums=self.video_max_slice_nums,
            max_pixels=self.video_max_pixels,
            packing=self.video_packing,
            max_packing=self.packing_maxlen,
            high_fps=self.enable_high_fps or None,
            high_fps_below=self.double_frame_duration,
            time_scale=self.time_scale,
        )


@dataclass
class MemoryArguments:
    """What saves memory inside a step; part of the training flags."""

    checkpoint_parts: list[str] | None = field(
        default=None,
        metadata={
            "help": "With gradient_checkpointing, the parts whose layers are run again. Default: all that keep "
            "anything; a frozen tower keeps nothing. fit: as few as the plan for the GPU's memory allows, if any.",
            "choices": ["llm", "vision", "audio", "fit"],
        },
    )
    vision_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most visual items (thumbnails, slices, frames) encoded at once, and clips of sound unless ZeRO-3. "
            "Default: all of a micro-batch. Saves memory where the tower is frozen or its layers are run again."
        },
    )


def check_memory(training: Any) -> None:
    """Refuses what would be without effect, or reach other networks.

    Raises:
        ArgumentError: --use_liger_kernel, or parts beside "fit".
    """
    if "fit" in (parts := training.checkpoint_parts or []) and len(parts) > 1:
        raise ArgumentError(f"--checkpoint_parts {' '.join(parts)}: fit chooses the parts itself; leave the others out")
    if training.use_liger_kernel:
        raise ArgumentError(
            "--use_liger_kernel true: liger-kernel replaces functions of transformers for every network of the process "
            "and knows none of these; what it saves at the loss is saved here without it (the output layer makes a few "
            "logits at a time)"
        )


@dataclass
class LoraArguments:
    """How LoRA adapters are made; only read with --use_lora."""

    lora_r: int = field(default=64, metadata={"help": "Rank."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale; the update is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter input."})
    lora_target_modules: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression over module names, or all-linear: every linear layer of lora_parts. Default: "
            "the attention projections of lora_parts, by names that the checkpoint's generation has."
        },
    )
    lora_target_parameters: str | None = field(
        default=None,
        metadata={
            "help": "Comma-separated ends of parameter names that get adapters too, for weights that are in no linear "
            "layer: mlp.experts.gate_up_proj,mlp.experts.down_proj of a mixture. Wants lora_dropout 0. Default: none."
        },
    )
    lora_bias: str = field(
        default="none", metadata={"help": "Biases to train.", "choices": ["none", "all", "lora_only"]}
    )
    lora_modules_to_save: str | None = field(
        default=None, metadata={"help": "Comma-separated modules trained in full and saved too, e.g. embed_tokens."}
    )
    lora_weight_path: str | None = field(
        default=None, metadata={"help": "Adapter folder to start from; its rank, targets and saved modules count."}
    )
    lora_layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Only these layers of the LLM get adapters, e.g. 0 1 2."}
    )
    lora_layers_pattern: str | None = field(
        default=None, metadata={"help": "Name of the layer list that lora_layers_to_transform counts in (layers)."}
    )
    lora_layer_replication: str | None = field(
        default=None, metadata={"help": 'Ranges of layers to stack, as JSON: "[[0, 16], [8, 24]]".'}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilised LoRA: scale alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    q_lora: bool = field(
        default=False,
        metadata={"help": "QLoRA: the LLM's linear layers are quantised to 4 bit (nf4, bitsandbytes) on loading."},
    )


def check_lora(lora: LoraArguments, *, use_lora: bool) -> None:
    """Refuses adapters on parameters that would be without effect or that peft does not make; warns of other flags.

    Raises:
        ArgumentError: --lora_target_parameters without LoRA, or with dropout, DoRA or repeated layers.
    """
    if not use_lora:
        if lora.lora_target_parameters is not None:
            raise ArgumentError(
                f"--lora_target_parameters {lora.lora_target_parameters} puts adapters on parameters: it needs "
                "--use_lora true"
            )
        given = [f"--{entry.name}" for entry in fields(lora) if getattr(lora, entry.name) != entry.default]
        if given:
            logger.warning("%s: no effect without --use_lora true", ", ".join(given))
    elif lora.lora_target_parameters is not None:
        reasons = {
            f"--lora_dropout {lora.lora_dropout:g}: an adapter on a parameter sees no input that could be dropped; "
            "--lora_dropout 0 does it": lora.lora_dropout,
            "--use_dora true: peft has no DoRA for parameters": lora.use_dora,
            "--lora_layer_replication: repeated layers have other names": lora.lora_layer_replication,
        }
        if reason := next((words for words, clash in reasons.items() if clash), None):
            raise ArgumentError(f"--lora_target_parameters does not go with {reason}")
