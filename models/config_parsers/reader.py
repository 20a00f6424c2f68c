"""Typed reading of config.json: every key is asked for with its type, and what nobody asked for is looked at last."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

MAX_INTEGER = 2**31 - 1
MAX_LAYERS = 4096  # far above any model; a typing error must not make a tuple of 10^9 entries


class _Required:
    """Marks a key without a default."""


REQUIRED = _Required()


def shown(value: Any, limit: int = 200) -> str:
    """`value` for the end of an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"


def listed(names: list[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class ConfigReader:
    """The keys of one JSON object. `where` opens every message, e.g. "config.json" or "rope_scaling in config.json".

    A null counts as an absent key (transformers writes null for "not set"), except in the `optional_` methods, where
    it means None. Every method raises ValueError naming the key, what is expected and the value found.
    """

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self.raw = raw
        self.where = where
        self.read: set[str] = set()

    def get(self, key: str) -> Any:
        """The raw value, or None; the key counts as read."""
        self.read.add(key)
        return self.raw.get(key)

    def error(self, key: str, expected: str) -> ValueError:
        return ValueError(f"{self.where}: {key} must be {expected}: {shown(self.raw.get(key))}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is not None:
            return value
        if isinstance(default, _Required):
            raise ValueError(f"{self.where}: the required key {key} is missing or null: {shown(self.raw.get(key))}")
        return default

    def integer(
        self, key: str, default: int | _Required = REQUIRED, *, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(key, f"an integer in [{minimum}, {maximum}]")
        return value

    def optional_integer(self, key: str, default: int | None, *, minimum: int = 1) -> int | None:
        """null means None; an absent key means `default`."""
        if key not in self.raw:
            self.read.add(key)
            return default
        return None if self.get(key) is None else self.integer(key, minimum=minimum)

    def number(self, key: str, default: float | _Required = REQUIRED, *, above: float = -math.inf) -> float:
        """A finite number greater than `above`."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= above:
            raise self.error(key, "a finite number" + ("" if above == -math.inf else f" greater than {above:g}"))
        return float(value)

    def optional_number(self, key: str, *, above: float = -math.inf) -> float | None:
        """Absent and null both mean None."""
        return None if self.get(key) is None else self.number(key, above=above)

    def boolean(self, key: str, default: bool | _Required = REQUIRED) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def string(self, key: str, default: str | _Required = REQUIRED) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def choice(self, key: str, supported: tuple[str, ...], default: str | _Required = REQUIRED) -> str:
        value = self.string(key, default)
        if value not in supported:
            raise self.unsupported(key, f"supported: {', '.join(supported)}")
        return value

    def object(self, key: str) -> Mapping[str, Any] | None:
        """A JSON object, or None where the key is absent or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(key, "an object or null")
        return value

    def integers(self, key: str, *, minimum: int = 0) -> tuple[int, ...]:
        """A list of integers, one bare integer, or nothing (absent, null)."""
        value = self.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) or not minimum <= v <= MAX_INTEGER for v in values):
            raise self.error(key, f"an integer, or a list of integers, of at least {minimum}")
        return tuple(values)

    def strings(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None where the key is absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings or null")
        return tuple(value)

    def unsupported(self, key: str, remedy: str) -> ValueError:
        """An error for a key whose value asks for a computation that is not implemented."""
        return ValueError(f"{self.where}: {key} is not implemented with this value; {remedy}: {shown(self.raw[key])}")

    def require_neutral(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuses each of these keys unless it is absent, null or has one of its values that change nothing.

        Keys that a family has read itself are left alone.
        """
        for key, values in neutral.items():
            if key in self.read:
                continue
            value = self.get(key)
            # `False == 0` and `1 == 1.0` in Python, and here: both say "nothing is done"
            if value is not None and not any(value == neutral_value for neutral_value in values):
                raise self.unsupported(key, f"supported: {', '.join(['null', *map(repr, values)])}")

    def finish(self, inert: frozenset[str]) -> None:
        """Logs one warning that lists the keys nobody has read and that are not known to be without effect here."""
        unknown = sorted(key for key in self.raw if key not in self.read and key not in inert and key[:1] != "_")
        if unknown:
            logger.warning("%s: keys that are not known here are ignored: %s", self.where, ", ".join(unknown))
