"""Flags of preference training (``--stage dpo``), under the names of LLaMA-Factory, and their rules; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.utils.errors import ArgumentError

WITHOUT_REFERENCE = ("orpo", "simpo")
"""Losses that need no reference model."""
FLAGS = ("pref_beta", "pref_loss", "pref_ftx", "dpo_label_smoothing", "simpo_gamma", "pref_reference")


@dataclass
class PreferenceArguments:
    """The loss of preference training; part of the training flags. None is the default that the help names."""

    pref_loss: str | None = field(
        default=None,
        metadata={
            "help": "Loss of stage dpo: sigmoid (DPO), ipo, hinge, orpo or simpo; the last two need no reference. "
            "Default: sigmoid.",
            "choices": ["sigmoid", "ipo", "hinge", "orpo", "simpo"],
        },
    )
    pref_beta: float | None = field(
        default=None,
        metadata={"help": "Beta of the loss, tau for ipo, weight of the odds ratio for orpo. Default: 0.1."},
    )
    pref_ftx: float | None = field(
        default=None,
        metadata={"help": "Weight of the supervised loss of the chosen answers, added to the loss. Default: 0."},
    )
    dpo_label_smoothing: float | None = field(
        default=None,
        metadata={"help": "Share of pairs that are assumed to be labelled the wrong way, for sigmoid. Default: 0."},
    )
    simpo_gamma: float | None = field(
        default=None, metadata={"help": "Margin that simpo asks for between both rewards. Default: 0.5."}
    )
    pref_reference: str | None = field(
        default=None,
        metadata={
            "help": "Where the log-probabilities of the reference come from: cached computes them once before step 1, "
            "by the model that training starts from; adapter_off in every step, by the model without its adapter. "
            "Default: cached.",
            "choices": ["cached", "adapter_off"],
        },
    )


@dataclass(frozen=True, slots=True)
class PreferenceOptions:
    """The flags with their defaults, which are LLaMA-Factory's; see ``PreferenceArguments``."""

    loss: str = "sigmoid"
    beta: float = 0.1
    ftx: float = 0.0
    label_smoothing: float = 0.0
    gamma: float = 0.5
    reference: str = "cached"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return self.loss not in WITHOUT_REFERENCE


def options_of(flags: PreferenceArguments) -> PreferenceOptions:
    """The options of some flags."""
    named = {
        "loss": flags.pref_loss,
        "beta": flags.pref_beta,
        "ftx": flags.pref_ftx,
        "label_smoothing": flags.dpo_label_smoothing,
        "gamma": flags.simpo_gamma,
        "reference": flags.pref_reference,
    }
    return PreferenceOptions(**{name: value for name, value in named.items() if value is not None})


def check_preference(flags: Mapping[str, Any]) -> None:
    """Refuses flags of preference training that have no effect, and what it cannot be combined with.

    Raises:
        ArgumentError: naming them.
    """
    given = [name for name in FLAGS if flags.get(name) is not None]
    if flags.get("stage", "sft") != "dpo":
        if given:
            raise ArgumentError(
                f"--{given[0]} {flags[given[0]]} belongs to preference training: give --stage dpo, or omit it"
            )
        return
    loss = flags.get("pref_loss") or "sigmoid"
    for name, only in (("dpo_label_smoothing", "sigmoid"), ("simpo_gamma", "simpo")):
        if flags.get(name) is not None and loss != only:
            raise ArgumentError(f"--{name} {flags[name]} has an effect with --pref_loss {only} only, and it is {loss}")
    if flags.get("pref_reference") is not None and loss in WITHOUT_REFERENCE:
        raise ArgumentError(
            f"--pref_reference {flags['pref_reference']}: --pref_loss {loss} needs no reference; omit it"
        )
    if flags.get("pref_reference") == "adapter_off":
        _check_adapter_off(flags)
    if flags.get("streaming"):
        raise ArgumentError(
            "--streaming true with --stage dpo: pairs are read by number, so that their reference can be computed "
            "once; remove --streaming"
        )


def _check_adapter_off(flags: Mapping[str, Any]) -> None:
    if not flags.get("use_lora"):
        raise ArgumentError("--pref_reference adapter_off needs adapters (--use_lora true); use cached")
    if flags.get("lora_bias", "none") != "none":
        raise ArgumentError(
            f"--pref_reference adapter_off with --lora_bias {flags['lora_bias']}: biases of the base itself train, and "
            "are not switched off with the adapter; use cached"
        )
    if flags.get("lora_weight_path"):
        raise ArgumentError(
            f"--pref_reference adapter_off with --lora_weight_path {flags['lora_weight_path']}: without the adapter "
            "the reference would not be the model that training starts from; use cached"
        )
