"""The flags about data: which records, how they are looked at, and what happens to those that cannot be used."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal, TypedDict

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
"""The flags that say how videos are looked at."""


Thinking = Literal["keep", "mask", "strip"]
DataFormat = Literal["auto", "official", "sharegpt", "alpaca", "openai"]


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


class LookingOptions(TypedDict):
    """Keywords of ``Encoder.from_config``."""

    max_slice_nums: int | None
    max_pixels: int | None
    shrink_pixels: int | None
    image_backend: Literal["pillow", "fast"]
    video: VideoOptions
    thinking: Thinking


class PolicyOptions(TypedDict):
    """Keywords of ``encoding.sample_policy.SamplePolicy``."""

    overlong: str
    on_bad_sample: str
    remeasure: bool
    max_bad_share: float


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str | None = field(
        default=None,
        metadata={"help": "Training data: a file (json, jsonl, parquet, arrow, csv, tar) or a folder of them."},
    )
    eval_data_path: str | None = field(default=None, metadata={"help": "Evaluation data, in the same forms."})
    data_format: DataFormat = field(
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
        metadata={
            "help": "Read jsonl, parquet, shards or hub data from front to back, not at random; needs max_steps."
        },
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
    thinking: Thinking = field(
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
        default = DataArguments.__dataclass_fields__["max_bad_share"].default
        if self.on_bad_sample != "skip" and self.max_bad_share != default:
            logger.warning("--max_bad_share %g: no effect without --on_bad_sample skip", self.max_bad_share)

    @property
    def reading(self) -> ReadingOptions:
        """How data are opened, as ``readers.mixture.open_data`` takes it."""
        return ReadingOptions(
            dataset_dir=self.dataset_dir,
            media_dir=self.media_dir,
            image_root=self.image_root,
            train_on=self.train_on,
            data_format=self.data_format,
            max_samples=self.max_samples,
            rebuild=self.overwrite_cache,
            strict_paths=self.strict_paths,
        )

    @property
    def looking(self) -> LookingOptions:
        """How samples become tensors, as ``Encoder.from_config`` takes it; without the length of a sample."""
        return LookingOptions(
            max_slice_nums=self.max_slice_nums,
            max_pixels=self.max_image_pixels,
            shrink_pixels=self.image_max_pixels,
            image_backend=self.image_backend,
            video=self.video_options,
            thinking=self.thinking,
        )

    @property
    def policies(self) -> PolicyOptions:
        """What happens to samples that are too long or cannot be used, as ``SamplePolicy`` takes it."""
        return PolicyOptions(
            overlong=self.overlong,
            on_bad_sample=self.on_bad_sample,
            remeasure=self.overwrite_cache,
            max_bad_share=self.max_bad_share,
        )

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
