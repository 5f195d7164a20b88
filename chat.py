"""``from chat import MiniCPMVChat, img2base64``, as the published guides write it."""

from finetune.chat import MiniCPMVChat, img2base64

__all__ = ["MiniCPMVChat", "img2base64"]
