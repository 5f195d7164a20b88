"""Tells which packets of an H.264 stream hold a picture that no other picture depends on."""

from __future__ import annotations

from collections.abc import Iterator

# nal_unit_type of ITU-T H.264, table 7-1: a slice of a picture that is no key frame; SEI, delimiter, filler data.
_SLICE, _BESIDE = 1, {6, 9, 12}
_START = b"\0\0\1"


def length_bytes(extradata: bytes | None) -> int:
    """Bytes of the length before each NAL unit, from the decoder configuration; 0 for start codes (Annex B)."""
    return (extradata[4] & 3) + 1 if extradata and len(extradata) > 4 and extradata[0] == 1 else 0


def is_disposable(packet: bytes, lengths: int) -> bool:
    """Whether a packet has nothing but slices of a picture that is not used for reference.

    That is what nal_ref_idc 0 says (ITU-T H.264, 7.4.1). A packet with anything else in it, as parameter sets, is not
    disposable, nor is one that cannot be read.

    Args:
        packet: one access unit.
        lengths: from ``length_bytes``.
    """
    heads = list(_by_lengths(packet, lengths) if lengths else _by_start_codes(packet))
    kinds = {head & 31 for head in heads}
    return _SLICE in kinds and kinds <= {_SLICE, *_BESIDE} and not any(head & 0x60 for head in heads)


def _by_lengths(packet: bytes, lengths: int) -> Iterator[int]:
    """The first byte of every NAL unit."""
    at = 0
    while at + lengths < len(packet):
        yield packet[at + lengths]
        at += lengths + int.from_bytes(packet[at : at + lengths], "big")
    if at != len(packet):
        yield 0  # unspecified type: the lengths do not add up


def _by_start_codes(packet: bytes) -> Iterator[int]:
    at = packet.find(_START)
    while 0 <= at < len(packet) - len(_START):
        yield packet[at + len(_START)]
        at = packet.find(_START, at + len(_START))
