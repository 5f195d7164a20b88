"""``ExampleSize``: tokens, visual items, patches and mel frames of an encoded sample, and its relative cost."""

from __future__ import annotations

from dataclasses import dataclass

_PATCH_COST = 0.1
"""Cost of a patch in tokens: the vision tower has about a tenth of the language model's parameters."""
_FRAME_COST = 0.02
"""Cost of a mel frame in tokens: the audio tower has about 1/25 of the parameters, and half as many positions."""


@dataclass(frozen=True, slots=True)
class ExampleSize:
    """Size of an encoded sample, computed without decoding its media.

    Attributes:
        tokens: number of input ids.
        items: number of visual items (thumbnails and slices).
        patches: number of vision patches of all items.
        frames: number of mel frames of all audio.
        cost: tokens + 0.1 patches + 0.02 frames; relative, for load balancing and packing.
    """

    tokens: int
    items: int
    patches: int
    frames: int = 0

    @property
    def cost(self) -> float:
        """Relative compute of a training step on this sample, in tokens."""
        return self.tokens + _PATCH_COST * self.patches + _FRAME_COST * self.frames
