"""``TracedBlock``: the activation memory of one layer, or of the operations between layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TracedBlock:
    """A layer, or the operations between layers; sizes in bytes.

    Attributes:
        part: part of the model.
        layer: whether it is a layer that gradient checkpointing can recompute.
        graph: whether a backward pass goes through it.
        saved: tensors saved for the backward pass.
        entering: its input, which is all that is saved of a recomputed layer.
        widest: the largest tensor made in it.
        copies: the share of ``saved`` that is 16 bit copies of fp32 weights, which autocast caches until the end of the
            forward pass.
        gradients: gradients of its trained parameters.
        largest: the largest of these gradients.
    """

    part: str
    layer: bool = False
    graph: bool = False
    saved: int = 0
    entering: int = 0
    widest: int = 0
    copies: int = 0
    gradients: int = 0
    largest: int = 0
