"""What the text of an answer must look like: `StructuredOutputsParams`, and where its reasoning stands."""

from __future__ import annotations

from typing import Any

import msgspec

CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


class StructuredOutputsParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Exactly one constraint on the text of an answer. Names are those of vLLM 0.32.

    json: a JSON schema, as text or as an object. regex: an expression that the whole text matches. choice: the texts
    there may be. grammar: Lark, or GBNF (an EBNF). json_object: any JSON object. structural_tag: free text with parts
    of given structure, as JSON text or as an object.

    The others change how JSON is written: `disable_any_whitespace` allows none between its tokens,
    `whitespace_pattern` says which (a regex), `disable_additional_properties` closes every object of the schema that
    does not say otherwise. A wrong value raises ValueError.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        for name in ("regex", "grammar", "whitespace_pattern"):
            _check(name, getattr(self, name), (str,), "a string")
        for name in ("json", "structural_tag"):
            _check(name, getattr(self, name), (str, dict), "JSON text or an object")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"structured_outputs.{name} must be true or false: {_short(getattr(self, name))}")
        _check("json_object", self.json_object, (bool,), "true or false")
        _check("choice", self.choice, (list, tuple), "a list of strings")
        if self.choice is not None:
            self.choice = list(self.choice)
            if not self.choice or not all(isinstance(text, str) for text in self.choice):
                raise ValueError(f"structured_outputs.choice must hold strings, at least one: {_short(self.choice)}")
        given = self.given
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs needs exactly one of {', '.join(CONSTRAINTS)}: {', '.join(given) or 'none'}"
            )
        try:  # between processes it is text
            for name in ("json", "structural_tag"):
                value = getattr(self, name)
                if isinstance(value, dict):
                    setattr(self, name, msgspec.json.encode(value).decode())
        except RecursionError:
            raise ValueError(f"structured_outputs.{name} is nested too deeply: {name}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"structured_outputs.{name} cannot be written as JSON: {error}") from error

    @property
    def given(self) -> list[str]:
        """The constraints that are set; `json_object` false is none."""
        return [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]


class ReasoningSpan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An answer begins with reasoning, which no constraint touches and a thinking budget counts.

    It ends behind any of `ends` (texts, often a token each); a spent budget writes the first of them. `starts` may open
    it and count as no thought. `barred` are tokens that must not stand in reasoning that a constrained text follows,
    such as the beginning of a tool call.
    """

    ends: list[str]
    starts: list[str] = []
    barred: list[str] = []


def _check(name: str, value: Any, types: tuple[type, ...], wanted: str) -> None:
    if value is not None and not isinstance(value, types):
        raise ValueError(f"structured_outputs.{name} must be {wanted}: {_short(value)}")


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
