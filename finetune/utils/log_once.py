"""Warnings that are logged once per process."""

from __future__ import annotations

import logging
from functools import cache


@cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Logs a warning, unless this process has logged the same one."""
    logger.warning("%s", message)
