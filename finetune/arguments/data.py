"""Data flags: stage, data files, image and video settings, loss masking, policies for long and for bad samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from finetune.arguments.unit_weights import parse_unit_weights
from finetune.media.video_sampling import VideoOptions
from finetune.utils.errors import ArgumentError

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
"""Flags of video sampling and slicing."""


Thinking = Literal["keep", "mask", "strip"]
DataFormat = Literal["auto", "official", "sharegpt", "alpaca", "openai", "duplex"]


class ReadingOptions(TypedDict):
    """Keywords of ``readers.mixture.open_data``."""

    dataset_dir: str
    media_dir: str | None
    image_root: str | None
    train_on: Literal["all", "last"]
    data_format: DataFormat
    max_samples: int | None
    rebuild: bool
    strict_paths: bool
    pairs: bool


class EncodingOptions(TypedDict):
    """Keywords of ``Encoder``."""

    max_slice_nums: int | None
    refuse_above_pixels: int | None
    max_pixels: int | None
    image_backend: Literal["pillow", "fast"]
    video: VideoOptions
    thinking: Thinking
    unit_weights: dict[str, float] | None


class PolicyOptions(TypedDict):
    """Keywords of ``encoding.sample_policy.SamplePolicy``."""

    overlong: str
    on_bad_sample: str
    remeasure: bool
    max_bad_share: float


@dataclass
class DataArguments:
    """Data of training and evaluation."""

    stage: Literal["sft", "dpo"] = field(
        default="sft",
        metadata={
            "help": "sft trains on conversations, dpo on preference pairs: a chosen and a rejected answer to one "
            "prompt (docs/preferences.md)."
        },
    )
    data_path: str | None = field(
        default=None,
        metadata={"help": "Training data: a file (json, jsonl, parquet, arrow, csv, tar) or a folder of them."},
    )
    eval_data_path: str | None = field(default=None, metadata={"help": "Evaluation data, in the same forms."})
    data_format: DataFormat = field(
        default="auto", metadata={"help": "Format of the records of data_path; auto detects and logs it."}
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Names of datasets in dataset_dir/dataset_info.json, separated by commas, instead of data_path. "
            "a:0.3 takes a random 30 percent of a, a:2 every record of a twice per epoch."
        },
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    dataset_dir: str = field(default="data", metadata={"help": "Folder of dataset_info.json and its files."})
    media_dir: str | None = field(
        default=None, metadata={"help": "Folder that media paths of dataset are relative to. Default: dataset_dir."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Maximum number of records of every dataset."})
    val_size: float = field(
        default=0.0,
        metadata={"help": "Training data held out for evaluation: a share below 1, or a number of records."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read jsonl, parquet, shards or hub data sequentially, without random access; needs max_steps."
        },
    )
    buffer_size: int = field(default=16384, metadata={"help": "Size of the shuffle buffer of streaming, in records."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Rebuild the cached index and sample lengths."})
    image_root: str | None = field(default=None, metadata={"help": "Additional folder for relative image paths."})
    strict_paths: bool = field(
        default=False,
        metadata={
            "help": "Refuse records with media outside of the folder of their data file, image_root and media_dir "
            "(links are followed): for untrusted data."
        },
    )
    train_on: Literal["all", "last"] = field(
        default="all",
        metadata={
            "help": "Assistant turns with loss: all, or only the last of a conversation. A message with "
            '"loss": 0 never has loss.',
        },
    )
    thinking: Thinking = field(
        default="keep",
        metadata={
            "help": "Treatment of <think>...</think> in answers, for models with a thinking mode: keep (train on it), "
            "mask (keep it without loss) or strip. An empty block never has loss.",
        },
    )
    unit_loss_weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights of the decisions of full-duplex records in the loss, such as listen=1,speak=1,yield=5; "
            "yield is to listen right after an own turn. Default: all 1."
        },
    )
    max_slice_nums: int | None = field(
        default=None, metadata={"help": "Maximum number of slices per image. Default: the checkpoint's value."}
    )
    max_image_pixels: int | None = field(
        default=None,
        metadata={"help": "Refuse images above this number of pixels (guards against decompression bombs)."},
    )
    image_max_pixels: int | None = field(
        default=None,
        metadata={"help": "Larger images are resized to this number of pixels before slicing. Default: no limit."},
    )
    image_backend: Literal["pillow", "fast"] = field(
        default="pillow",
        metadata={
            "help": "Image decoding: pillow; or fast, JPEG files by simplejpeg, whose pixels are the same where both "
            "packages have the same version of libjpeg-turbo."
        },
    )
    video_fps: float | None = field(
        default=None,
        metadata={"help": "Frames sampled per second; for a folder of frames, its frame rate. Default: 1, for 4.5 3."},
    )
    video_max_frames: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of frames per video. Default: 64; for 4.5 180 groups, for 4.6, 4.7 and OCR the "
            "checkpoint's 128."
        },
    )
    video_max_slice_nums: int | None = field(
        default=None,
        metadata={"help": "Maximum number of slices per frame. Default: 1, for 4.6, 4.7 and OCR the checkpoint's."},
    )
    video_max_pixels: int | None = field(
        default=None,
        metadata={"help": "Larger frames are resized to this number of pixels before slicing. Default: no limit."},
    )
    video_packing: int | None = field(
        default=None, metadata={"help": "Frames per group, for 4.5. Default: 1, more for long videos."}
    )
    packing_maxlen: int | None = field(
        default=None, metadata={"help": "Maximum number of frames per group, for 4.5. Default: 3."}
    )
    enable_high_fps: bool = field(
        default=False, metadata={"help": "Sample short videos at twice the rate, two frames per group, for 4.5."}
    )
    double_frame_duration: float | None = field(
        default=None,
        metadata={"help": "Duration in seconds below which a video is short for enable_high_fps. Default: 30."},
    )
    time_scale: float | None = field(
        default=None, metadata={"help": "Seconds per time index of a packed frame, for 4.5. Default: 0.1."}
    )
    overlong: str = field(
        default="shrink",
        metadata={
            "help": "Samples above model_max_length: shrink uses fewer slices per image, then removes the oldest "
            "turns; truncate shortens prompt text, then removes turns; drop skips the sample; error stops.",
            "choices": ["shrink", "drop", "truncate", "error"],
        },
    )
    on_bad_sample: str = field(
        default="error",
        metadata={
            "help": "Records with errors: error stops; skip skips them and lists them in OUTPUT_DIR/bad_samples.jsonl.",
            "choices": ["error", "skip"],
        },
    )
    max_bad_share: float = field(
        default=0.1,
        metadata={
            "help": "With on_bad_sample skip: stop the run (exit code 4) when more than this share of the samples has "
            "errors. Samples that are only too long do not count. 1 never stops."
        },
    )
    check: str | None = field(
        default=None,
        metadata={
            "help": "Records checked before step 1: full, sample (1000 of them) or off. Default: full up to 20000.",
            "choices": ["full", "sample", "off"],
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            raise ArgumentError(f"--max_bad_share {self.max_bad_share}: it is a share, from 0 to 1")
        if parse_unit_weights(self.unit_loss_weights) is not None and self.stage == "dpo":
            raise ArgumentError(
                "--unit_loss_weights weighs decisions of full-duplex records, which --stage dpo has none of"
            )
        default = DataArguments.__dataclass_fields__["max_bad_share"].default
        if self.on_bad_sample != "skip" and self.max_bad_share != default:
            logger.warning("--max_bad_share %g: no effect without --on_bad_sample skip", self.max_bad_share)

    @property
    def reading(self) -> ReadingOptions:
        """Arguments of ``readers.mixture.open_data``."""
        return ReadingOptions(
            dataset_dir=self.dataset_dir,
            media_dir=self.media_dir,
            image_root=self.image_root,
            train_on=self.train_on,
            data_format=self.data_format,
            max_samples=self.max_samples,
            rebuild=self.overwrite_cache,
            strict_paths=self.strict_paths,
            pairs=self.stage == "dpo",
        )

    @property
    def encoding(self) -> EncodingOptions:
        """Arguments of ``Encoder``, without max_length."""
        return EncodingOptions(
            max_slice_nums=self.max_slice_nums,
            refuse_above_pixels=self.max_image_pixels,
            max_pixels=self.image_max_pixels,
            image_backend=self.image_backend,
            video=self.video_options,
            thinking=self.thinking,
            unit_weights=parse_unit_weights(self.unit_loss_weights),
        )

    @property
    def policies(self) -> PolicyOptions:
        """Arguments of ``SamplePolicy``: what to do with samples that are too long or have errors."""
        return PolicyOptions(
            overlong=self.overlong,
            on_bad_sample=self.on_bad_sample,
            remeasure=self.overwrite_cache,
            max_bad_share=self.max_bad_share,
        )

    @property
    def video_options(self) -> VideoOptions:
        """Video settings; None keeps the value of the checkpoint."""
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
