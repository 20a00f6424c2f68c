"""Structural tags, free text with parts of given structure, as a Lark grammar for llguidance.

Formats are vLLM's: `structures` with `triggers`, and `format`, the nested form of xgrammar's documentation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

ANY_TEXT = r"/(.|\n)*/"
SubGrammar = Callable[[str, str], dict[str, Any]]  # kind, text -> an entry of llguidance's list of grammars


class TagGrammar:
    """Rules in the making. `special_tokens` maps texts of tokens that are no text to their ids."""

    def __init__(self, sub_grammar: SubGrammar, special_tokens: Mapping[str, int]) -> None:
        self._sub_grammar = sub_grammar
        self._special = special_tokens
        names = sorted(map(re.escape, special_tokens), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(names) + ")") if names else None
        self._rules: list[str] = []
        self._grammars: list[dict[str, Any]] = []

    def build(self, tag: dict[str, Any]) -> str:
        """llguidance's grammar text of a structural tag; ValueError names what is wrong or not supported."""
        if "format" in tag:
            start = self._format(tag["format"])
        elif "structures" in tag:
            structures = _list(tag, "structures")
            tags = [
                {"begin": _text(each, "begin"), "end": _text(each, "end"),
                 "content": {"type": "json_schema", "json_schema": each.get("schema", {})}}
                for each in structures
            ]  # fmt: skip
            start = self._triggered({"triggers": _list(tag, "triggers"), "tags": tags})
        else:
            raise ValueError(f"a structural tag needs format, or structures and triggers: {', '.join(tag)}")
        lark = "\n".join(["%llguidance {}", f"start: {start}", *self._rules])
        return json.dumps({"grammars": [{"name": "tags", "lark_grammar": lark}, *self._grammars]})

    def _format(self, node: Any) -> str:
        """A Lark expression for one format."""
        if not isinstance(node, dict):
            raise ValueError(f"a format of a structural tag must be an object: {node!r:.100}")
        kind = node.get("type")
        if kind == "const_string":
            return self._literal(_text(node, "value"))
        if kind == "any_text":
            return self._rule(ANY_TEXT)
        if kind == "json_schema":
            return self._reference("json", json.dumps(node.get("json_schema", {})))
        if kind == "regex":
            return self._reference("regex", _text(node, "pattern"))
        if kind == "grammar":
            return self._reference("grammar", _text(node, "grammar"))
        if kind in ("sequence", "or"):
            parts = [self._format(part) for part in _list(node, "elements")]
            return self._rule((" " if kind == "sequence" else " | ").join(parts))
        if kind == "tag":
            return self._rule(f"{self._literal(_text(node, 'begin'))} {self._ended(node)}")
        if kind == "triggered_tags":
            return self._triggered(node)
        if kind == "tags_with_separator":
            one = self._rule(" | ".join(self._format({**tag, "type": "tag"}) for tag in _list(node, "tags")))
            more = "" if node.get("stop_after_first") else f" ({self._literal(_text(node, 'separator'))} {one})*"
            whole = self._rule(one + more)
            return whole if node.get("at_least_one") else self._rule(f"{whole}?")
        raise ValueError(
            "a structural tag's format must be const_string, any_text, json_schema, regex, grammar, sequence, or, tag, "
            f"triggered_tags or tags_with_separator: {kind!r:.100}"
        )

    def _triggered(self, node: dict[str, Any]) -> str:
        """Free text; where it writes a trigger, a tag that begins with it must follow."""
        triggers = _list(node, "triggers")
        if not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise ValueError(f"triggers of a structural tag must be texts: {triggers!r:.100}")
        tags = []
        for tag in _list(node, "tags"):
            begin = _text(tag, "begin")
            trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
            if trigger is None:
                raise ValueError(f"the beginning of every tag must begin with one of triggers: {begin!r:.100}")
            if trigger in self._special:
                opening = f"{self._rule(ANY_TEXT)} {self._literal(trigger)}"
            else:
                opening = self._rule(f"{ANY_TEXT} {self._literal(trigger)}", "[lazy]")
            tags.append(self._rule(f"{opening} {self._literal(begin[len(trigger) :])} {self._ended(tag)}"))
        one = self._rule(" | ".join(tags))
        text = self._rule(ANY_TEXT)
        if node.get("stop_after_first"):
            return one if node.get("at_least_one") else self._rule(f"{one} | {text}")
        return self._rule(f"{one}{'+' if node.get('at_least_one') else '*'} {text}")

    def _ended(self, tag: dict[str, Any]) -> str:
        """What stands between a tag's beginning and its end, and the end."""
        content, end = tag.get("content"), _text(tag, "end")
        if isinstance(content, dict) and content.get("type") == "any_text" and end:
            if end in self._special:
                return f"{self._rule(ANY_TEXT)} {self._literal(end)}"
            return self._rule(f"{ANY_TEXT} {self._literal(end)}", "[lazy]")
        return f"{self._format(content)} {self._literal(end)}"

    def _literal(self, text: str) -> str:
        """Text as strings and tokens that are no text."""
        pieces = self._split.split(text) if self._split is not None else [text]
        written = [
            f"<[{self._special[piece]}]>" if piece in self._special else json.dumps(piece, ensure_ascii=False)
            for piece in pieces
            if piece
        ]
        return " ".join(written) or '""'

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def _reference(self, kind: str, text: str) -> str:
        name = f"g{len(self._grammars)}"
        self._grammars.append({**self._sub_grammar(kind, text), "name": name})
        return f"@{name}"


def _text(node: Any, key: str) -> str:
    value = node.get(key) if isinstance(node, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{key} in a structural tag must be a string: {value!r:.100}")
    return value


def _list(node: dict[str, Any], key: str) -> list[Any]:
    value = node.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} in a structural tag must be a list that is not empty: {value!r:.100}")
    return value
