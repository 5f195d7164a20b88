"""Image files of every troublesome kind."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def gradient(width: int = 64, height: int = 48) -> Image.Image:
    """Red grows to the right, green downwards, blue falls to the right."""
    across = np.broadcast_to(np.linspace(0, 255, width), (height, width)).astype(np.uint8)
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width)).astype(np.uint8)
    return Image.fromarray(np.stack([across, down, 255 - across], axis=2))


def png_header(width: int, height: int) -> bytes:
    """A PNG file of one bit per pixel that says how large it is and has no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def write_zoo(folder: Path) -> Path:
    rgb = gradient()
    rgb.save(folder / "good.png")
    Image.effect_noise((320, 240), 80).convert("RGB").save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=100)
    grey = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    Image.fromarray(grey).save(folder / "sixteen.png")
    palette = rgb.quantize(32)
    palette.info["transparency"] = bytes([0, 128] + [255] * 30)
    palette.save(folder / "palette.png", transparency=palette.info["transparency"])
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    (folder / "huge.png").write_bytes(png_header(10_000, 10_000))
    return folder
