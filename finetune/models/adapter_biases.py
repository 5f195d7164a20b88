"""Adapters that also train biases of the base's own layers (``bias`` of peft's LoraConfig)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from finetune.utils.errors import CheckpointError

# What peft says when such an adapter is switched off; untrue of the class below.
_CAREFUL = "Careful, disabling adapter layers with bias"

# Of an attention layer of torch too, which the oldest peft trains with "all".
_BIASES = (".bias", ".in_proj_bias")


class PeftModelWithBiases(PeftModel):
    """A model whose adapter overwrote biases of the base; ``disable_adapter()`` puts the base's values back.

    peft keeps such biases in the layers of the base, where they stay when it switches the adapter off.
    """

    def keep_base_biases(self, values: Mapping[str, torch.Tensor]) -> None:
        """Sets the biases of the base, by parameter names of this model."""
        self._base_biases = dict(values)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model, inside the block.

        Raises:
            CheckpointError: biases are offloaded, so that their values cannot be exchanged.
        """
        with ExitStack() as stack:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=_CAREFUL)
                stack.enter_context(super().disable_adapter())
            stack.enter_context(_exchanged(self, self._base_biases))
            yield


def trains_biases(settings: Mapping[str, Any]) -> bool:
    """Whether the adapter of an adapter_config.json trains biases of the base's layers."""
    return (settings.get("bias") or "none") != "none"


def is_base_bias(name: str) -> bool:
    """Whether a parameter of a model with adapters is a bias of the base: not of an adapter or of a module's copy."""
    return name.endswith(_BIASES) and ".lora_" not in name and ".modules_to_save." not in name


def biases(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all biases of a model, by parameter name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if name.endswith(_BIASES)}


@contextmanager
def _exchanged(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in values}
    if offloaded := next((name for name, parameter in parameters.items() if parameter.is_meta), None):
        raise CheckpointError(
            f"{offloaded} is offloaded: an adapter with trained biases cannot be switched off then; load the base by "
            "itself, or let the model fit on its devices"
        )
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _write(parameters, values)
    try:
        yield
    finally:
        _write(parameters, own)


def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
