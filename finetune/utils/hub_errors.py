"""Exception types that a request to the Hugging Face hub may raise."""

from __future__ import annotations


def hub_errors() -> tuple[type[Exception], ...]:
    """What a request to the hub may raise: no connection, a refusal, a file that cannot be read.

    The client has changed its HTTP library (requests, httpx, httpx2); the bases of its own error name the one it uses.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__  # pyright: ignore[reportReturnType]
