"""Configuration classes of MiniCPM-V and MiniCPM-o, with the flat keys of the published config.json."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from finetune.families import detect
from finetune.families.family import Family
from finetune.models.kv_cache import NAMES


class MiniCPMVConfig(PretrainedConfig):
    """A published config.json, every key kept as it was read.

    It does not inherit a language model's configuration: that would rewrite the rope keys when saved, and code for the
    official layout would then silently use another rope base. The configurations of the parts are made when the parts
    are built. Only ``use_cache`` is dropped, as transformers does: 2.5 publishes false, a setting of its training, with
    which every step of ``generate`` would encode the images again.
    """

    model_type: ClassVar[str] = "minicpmv"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [*NAMES, "row_loss"]

    # In the base class this is a property that turns the key into another one and warns.
    rope_scaling: ClassVar[Any] = None

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Keeps the rope keys as they were read."""
        return kwargs

    @property
    def family(self) -> Family:
        """The generation this configuration belongs to.

        Raises:
            UnknownFamilyError: it is none of the supported ones.
        """
        return detect(self.to_dict())

    def read(self, key: str, default: Any = None) -> Any:
        """The value of an official key, or ``default`` when it is absent or null."""
        value = getattr(self, key, None)
        return default if value is None else value


class MiniCPMOConfig(MiniCPMVConfig):
    """The same for MiniCPM-o, which has an audio tower."""

    model_type: ClassVar[str] = "minicpmo"
