"""Inputs of a memory estimate: method, ZeRO stage, number of GPUs, recomputation, and shape of the micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Method = Literal["full", "full-llm", "lora", "qlora"]
METHODS: dict[Method, str] = {
    "full": "everything in full",
    "full-llm": "LLM and resampler in full, vision frozen",
    "lora": "LoRA in the LLM, resampler in full",
    "qlora": "LoRA on a 4 bit LLM, resampler in full",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleShape:
    """The largest micro-batch of one GPU.

    Attributes:
        batch: samples.
        tokens: of the longest sample, to which the others are padded.
        items: visual items (thumbnails and slices) per sample.
        patches: vision patches per item.
        labelled: share of the tokens with a label.
    """

    batch: int = 1
    tokens: int = 2048
    items: int = 10
    patches: int = 1024
    labelled: float = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """How a model is trained.

    Attributes:
        method: what trains, a key of METHODS.
        stage: ZeRO stage, 0 without DeepSpeed.
        offload: whether the optimizer state (with ZeRO-3 also the weights) is offloaded to CPU memory.
        gpus: number of processes.
        checkpointing: whether layers are recomputed in the backward pass (gradient checkpointing).
        checkpoint_parts: the parts whose layers are recomputed, None for all.
        accumulation: micro-batches per optimizer step.
        vision_batch: maximum number of visual items encoded at once, None for all.
        lora_r: rank of the adapters.
        tune_vision: whether the vision tower is trained; None for the method's default.
        tune_resampler: whether the resampler is trained; None for the method's default.
        in_4bit: whether the checkpoint is stored in 4 bit.
    """

    method: Method = "lora"
    stage: int = 0
    offload: bool = False
    gpus: int = 1
    checkpointing: bool = True
    checkpoint_parts: tuple[str, ...] | None = None
    accumulation: int = 1
    vision_batch: int | None = None
    lora_r: int = 64
    tune_vision: bool | None = None
    tune_resampler: bool | None = None
    in_4bit: bool = False

    @property
    def packed(self) -> bool:
        """Whether weights are in 4 bit, as they are stored or by QLoRA; they cannot be partitioned."""
        return self.in_4bit or self.method == "qlora"

    @property
    def adapters(self) -> bool:
        """Whether adapters are trained in the LLM."""
        return self.method in ("lora", "qlora")

    def recomputes(self, part: str) -> bool:
        """Whether the layers of a part are recomputed."""
        return self.checkpointing and (self.checkpoint_parts is None or part in self.checkpoint_parts)

    @property
    def vision(self) -> bool:
        """Whether the vision tower trains."""
        return self.method == "full" if self.tune_vision is None else self.tune_vision

    @property
    def master_weights(self) -> bool:
        """Whether trained weights are 16 bit with fp32 master weights (DeepSpeed), instead of fp32."""
        return self.stage > 0

    def training_flags(self) -> dict[str, Any]:
        """The flags that decide which parameters train, by name."""
        flags: dict[str, Any] = {"use_lora": True} if self.adapters else {}
        if self.method == "full-llm":
            flags["tune_vision"] = False
        for name in ("tune_vision", "tune_resampler"):
            if (value := getattr(self, name)) is not None:
                flags[name] = value
        return flags

    def flags(self) -> list[str]:
        """The flags of this setup, as given to finetune.py."""
        given = [f"--{name} {str(value).lower()}" for name, value in self.training_flags().items()]
        if self.method == "qlora":
            given.append("--q_lora true")
        if self.lora_r != 64 and self.adapters:
            given.append(f"--lora_r {self.lora_r}")
        given.append(f"--deepspeed {self.ds_config or 'none'}")
        given.append(f"--gradient_checkpointing {str(self.checkpointing).lower()}")
        if self.checkpointing and self.checkpoint_parts is not None:
            given.append(f"--checkpoint_parts {' '.join(self.checkpoint_parts)}")
        if self.vision_batch is not None:
            given.append(f"--vision_batch {self.vision_batch}")
        return given

    @property
    def ds_config(self) -> str | None:
        """The DeepSpeed configuration file of this repository for this setup."""
        return f"ds_config_zero{self.stage}{'_offload' if self.offload else ''}.json" if self.stage else None
