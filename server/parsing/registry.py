"""The names of the parsers and the classes behind them, imported when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

_TOOLS = {
    "deepseek_v3": "sections:DeepSeekV3ToolParser",
    "deepseek_v31": "sections:DeepSeekV31ToolParser",
    "deepseek_v32": "dsml:DeepSeekV32ToolParser",
    "glm45": "tagged_parameters:Glm4MoeToolParser",
    "glm47": "tagged_parameters:Glm4MoeToolParser",
    "granite": "json_lists:GraniteToolParser",
    "granite-20b-fc": "hermes:Granite20bFCToolParser",
    "granite4": "hermes:Granite4ToolParser",
    "hermes": "hermes:Hermes2ProToolParser",
    "internlm": "hermes:Internlm2ToolParser",
    "kimi_k2": "sections:KimiK2ToolParser",
    "llama3_json": "llama:Llama3JsonToolParser",
    "llama4_json": "llama:Llama3JsonToolParser",
    "llama4_pythonic": "pythonic:Llama4PythonicToolParser",
    "mistral": "json_lists:MistralToolParser",
    "openai": "harmony:OpenAIToolParser",
    "pythonic": "pythonic:PythonicToolParser",
    "qwen3_coder": "tagged_parameters:Qwen3CoderToolParser",
    "qwen3_json": "hermes:Hermes2ProToolParser",
    "qwen3_xml": "tagged_parameters:Qwen3CoderToolParser",
    "xlam": "json_lists:XLAMToolParser",
}
_REASONING = {
    "deepseek_r1": "tags:DeepSeekR1ReasoningParser",
    "deepseek_v3": "tags:DeepSeekV3ReasoningParser",
    "glm45": "tags:Glm45ReasoningParser",
    "glm47": "tags:Glm45ReasoningParser",
    "granite": "tags:GraniteReasoningParser",
    "kimi_k2": "tags:KimiK2ReasoningParser",
    "openai_gptoss": "harmony:GptOssReasoningParser",
    "qwen3": "tags:Qwen3ReasoningParser",
    "tags": "tags:TagReasoningParser",
}


class ParserTable:
    """Parsers of one kind by name: built in, registered, or brought by installed packages in an entry point group."""

    def __init__(self, kind: str, folder: str, built_in: Mapping[str, str], entry_point_group: str) -> None:
        self.kind = kind
        self.entry_point_group = entry_point_group
        self._folder = folder
        self._built_in = built_in
        self._registered: dict[str, Any] = {}

    def names(self) -> list[str]:
        """All names, in order."""
        return sorted({*self._built_in, *self._registered, *self._entry_points()})

    def get(self, name: str) -> Any:
        """The class of that name; imports it. KeyError with all names for another one."""
        if name in self._registered:
            return self._registered[name]
        if name in self._built_in:
            module, _, class_name = self._built_in[name].partition(":")
            return getattr(importlib.import_module(f"{self._folder}.{module}"), class_name)
        if name in (entry_points := self._entry_points()):
            return entry_points[name].load()
        raise KeyError(f"{self.kind} parser not found, the known ones are {', '.join(self.names())}: {name}")

    def register(self, name: str | list[str] | None, parser: Any, base: type, *, force: bool) -> Any:
        """Give a class a name or several, its own name by default; returns it. Without a class, a decorator."""
        if parser is None:
            return lambda decorated: self.register(name, decorated, base, force=force)
        if not (isinstance(parser, type) and issubclass(parser, base)):
            raise TypeError(f"a {self.kind} parser must be a subclass of {base.__name__}: {parser!r}")
        names = [name or parser.__name__] if name is None or isinstance(name, str) else name
        if not all(isinstance(each, str) for each in names):
            raise TypeError(f"the name of a {self.kind} parser must be a string or a list of strings: {name!r}")
        for each in names:
            if not force and each in self.names():
                raise KeyError(f"a {self.kind} parser of this name is there already: {each}")
            self._registered[each] = parser
        return parser

    def refuse_file(self, path: str) -> None:
        """Raises ValueError; says how to bring a parser instead."""
        raise ValueError(
            f"a {self.kind} parser is not loaded from a file; install a package that names its class in the entry "
            f"point group {self.entry_point_group}: {path}"
        )

    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        return {found.name: found for found in metadata.entry_points(group=self.entry_point_group)}


TOOL_PARSERS = ParserTable("tool", f"{__package__}.tools", _TOOLS, "omni_engine.tool_parsers")
REASONING_PARSERS = ParserTable("reasoning", f"{__package__}.reasoning", _REASONING, "omni_engine.reasoning_parsers")


def supported_tool_parsers() -> list[str]:
    """The names for --tool-call-parser."""
    return TOOL_PARSERS.names()


def supported_reasoning_parsers() -> list[str]:
    """The names for --reasoning-parser."""
    return REASONING_PARSERS.names()
