"""How large an encoded sample is."""

from __future__ import annotations

from dataclasses import dataclass

_PATCH_COST = 0.1
"""Cost of a patch in tokens: the vision tower has about a tenth of the parameters that a token passes."""
_FRAME_COST = 0.02
"""Cost of a mel frame: the audio tower has a twenty-fifth of the parameters, and half as many places as frames."""


@dataclass(frozen=True, slots=True)
class ExampleSize:
    """Size of an encoded sample, known without decoding its media.

    Attributes:
        tokens: length of the ids.
        items: visual items (thumbnails and slices).
        patches: vision patches of all items.
        frames: mel frames of all sound.
        cost: tokens plus a tenth per patch and a fiftieth per frame; relative, for balancing and packing.
    """

    tokens: int
    items: int
    patches: int
    frames: int = 0

    @property
    def cost(self) -> float:
        """Work of a training step on this sample, in tokens."""
        return self.tokens + _PATCH_COST * self.patches + _FRAME_COST * self.frames
