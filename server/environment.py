"""The environment variables that the server reads, by vLLM's names; docs/environment.md lists all that count."""

from __future__ import annotations

import os


def read_flag(name: str) -> bool:
    """Whether `name` is 1 or true."""
    return os.environ.get(name, "0").strip().lower() in ("1", "true")


def read_switch(name: str, *, default: bool) -> bool:
    """Whether `name` is 1 or true; what it is by default where it is not set."""
    return read_flag(name) if os.environ.get(name, "").strip() else default


def read_number(name: str, default: float) -> float:
    """A number, not negative; raises ValueError."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not value >= 0:
        raise ValueError(f"{name} must be a number, not negative: {text}")
    return value


def read_count(name: str, default: int) -> int:
    """A whole number, 1 or more; raises ValueError."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name} must be a whole number, 1 or more: {text}")
    return int(text)
