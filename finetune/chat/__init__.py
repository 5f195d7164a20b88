"""Chat with a model: ``MiniCPMVChat``, ``model.chat``, the terminal and the web page, all over ``ChatPipeline``."""

from finetune.chat.minicpmv_chat import MiniCPMVChat, img2base64

__all__ = ["MiniCPMVChat", "img2base64"]
