"""Talking to a model: the guide's class, ``model.chat``, the terminal and the page are all built on ``Talker``."""

from finetune.chat.guide import MiniCPMVChat, img2base64

__all__ = ["MiniCPMVChat", "img2base64"]
