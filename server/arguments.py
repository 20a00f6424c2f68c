"""Command-line arguments: flags made from the fields of `EngineArgs`, and those of each command."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from ..engine.config import EngineArgs
from .vllm_flags import VLLM_FLAGS

_ALIASES = {
    "compilation_config": ["-O", "-cc"],
    "data_parallel_size": ["-dp"],
    "gpu_memory_utilization": ["--device-memory-utilization"],
    "pipeline_parallel_size": ["-pp"],
    "quantization": ["-q"],
    "speculative_config": ["-sc"],
    "tensor_parallel_size": ["-tp"],
}
_SIZE = re.compile(r"(-?\d+(?:\.\d+)?)([kKmMgGtT]?)")
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class CommandParser(argparse.ArgumentParser):
    """The parser of one command: `_` and `-` are the same in flags, and a wrong flag is answered with the nearest."""

    def __init__(self, command: str, takes: str, description: str) -> None:
        name = f"omni-engine {command}"
        usage = " ".join(filter(None, (name, takes, "[options]")))
        super().__init__(prog=name, usage=usage, description=description, allow_abbrev=False)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; a usage error ends the process with status 2."""
        words = self._join_dotted([_with_dashes(word) for word in argv])
        arguments, unknown = self.parse_known_intermixed_args(words)
        # A value of an unknown flag is unknown too, but it is the flag that is wrong.
        wrong = [word for word in unknown if re.match(r"--?[A-Za-z]", word)]
        if wrong:
            self.error(self._unknown_flag(wrong[0]))
        if unknown:
            self.error(f"too many arguments; quote text that holds spaces: {unknown[0]}")
        return arguments

    def _join_dotted(self, words: list[str]) -> list[str]:
        """`--flag.key.part value` of a flag that takes a JSON object, several of them together as one object."""
        kept: list[str] = []
        joined: dict[str, dict[str, Any]] = {}
        rest = iter(words)
        for word in rest:
            name, equals, value = word.partition("=")
            flag, dot, path = name.partition(".")
            action = self._option_string_actions.get(flag)
            if not dot or action is None or action.type not in (parse_json_object, parse_compilation_config):
                kept.append(word)
                continue
            if not equals:
                value = next(rest, "")
            *parents, last = path.split(".")
            target = joined.setdefault(action.option_strings[0], {})
            for parent in parents:
                target = target.setdefault(parent, {})
            try:
                target[last] = json.loads(value)
            except ValueError:
                target[last] = value  # a plain word
        for flag, value in joined.items():
            kept += [flag, json.dumps(value)]
        return kept

    def find_flag(self, flag: str) -> argparse.Action:
        """The long flag `flag`; one that is unknown is a usage error."""
        action = self._option_string_actions.get(flag)
        if action is None:
            self.error(self._unknown_flag(flag))
        return action

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _unknown_flag(self, word: str) -> str:
        flag = word.split("=")[0].split(".")[0]
        if flag in VLLM_FLAGS or f"--{flag.removeprefix('--no-')}" in VLLM_FLAGS:
            return f"not supported yet: {flag}"
        known = [*self._option_string_actions, *VLLM_FLAGS]
        near = difflib.get_close_matches(flag, known, n=1)
        return f"unknown flag{f', did you mean {near[0]}?' if near else ''}: {flag}"


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    if " " in flag:
        return word  # text, not a flag
    name, dot, path = flag.partition(".")  # what follows are keys of a JSON object, which are spelt as they are
    return name.replace("_", "-") + dot + path + equals + value


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of `EngineArgs`. What is not given stays out of the namespace."""
    group = parser.add_argument_group("engine")
    hints = get_type_hints(EngineArgs)
    for field in dataclasses.fields(EngineArgs):
        _add_field(group, field, hints[field.name])


def engine_args(arguments: argparse.Namespace) -> EngineArgs:
    """`EngineArgs` of the flags that were given; raises ValueError."""
    names = {field.name for field in dataclasses.fields(EngineArgs)}
    return EngineArgs(**{name: value for name, value in vars(arguments).items() if name in names})


def _add_field(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    flags = [f"--{field.name.replace('_', '-')}", *_ALIASES.get(field.name, [])]
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": _help(field)}
    kinds = get_args(hint) or (hint,)
    if bool in kinds:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
        return
    lists = [kind for kind in (hint, *kinds) if get_origin(kind) is list]
    if lists:
        options["nargs"] = "+"
        kinds = get_args(lists[0])
    if "choices" in field.metadata:
        options["choices"] = field.metadata["choices"]
    else:
        options["metavar"] = field.name.upper()
    group.add_argument(*flags, type=_converter(field, kinds), **options)


def _help(field: dataclasses.Field[Any]) -> str:
    text = field.metadata.get("help", "")
    default = field.default
    # A field without a plain default has an empty one, and None means what the text says.
    if default is not dataclasses.MISSING and default not in (None, "", False) and "default" not in text:
        text = f"{text} (default: {default})"
    return text.replace("%", "%%")


def _converter(field: dataclasses.Field[Any], kinds: tuple[Any, ...]) -> Callable[[str], Any]:
    if field.name == "compilation_config":
        return parse_compilation_config
    if field.metadata.get("json"):
        return parse_json_object
    if field.metadata.get("size"):
        return parse_size_or_word if str in kinds else parse_size
    return next((kind for kind in (int, float) if kind in kinds), str)


def parse_size(text: str) -> int:
    """A count: 4096, 4k (4000), 4K (4096), 1.5g (1 500 000 000)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"not a number, with or without k, K, m, M, g, G, t or T: {text}")
    number, unit = match.groups()
    if unit in _BINARY:
        if "." in number:
            raise argparse.ArgumentTypeError(
                f"{unit} takes whole numbers only; use {unit.lower()} for fractions: {text}"
            )
        return int(number) * _BINARY[unit]
    value = float(number) * _DECIMAL[unit] if "." in number else int(number) * _DECIMAL[unit]
    if value != int(value):
        raise argparse.ArgumentTypeError(f"not a whole number: {text}")
    return int(value)


def parse_size_or_word(text: str) -> int | str:
    """A count, or a word such as auto."""
    return text if text.isalpha() else parse_size(text)


def parse_json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    return value


def parse_compilation_config(text: str) -> dict[str, Any]:
    """A JSON object, or the number of a mode, as in -O3."""
    return {"mode": int(text)} if text.isdecimal() else parse_json_object(text)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the terminal commands for the commonest sampling parameters."""
    group = parser.add_argument_group("sampling (defaults: the model's generation_config.json)")
    add = group.add_argument
    add("--max-tokens", type=parse_size, default=argparse.SUPPRESS, help="longest answer in tokens")
    add("--temperature", type=float, default=argparse.SUPPRESS, help="0: always the likeliest token")
    add("--top-p", type=float, default=argparse.SUPPRESS, help="sample from the likeliest tokens of this total share")
    add("--top-k", type=int, default=argparse.SUPPRESS, help="sample from this many of the likeliest tokens")
    add("--min-p", type=float, default=argparse.SUPPRESS, help="drop tokens under this share of the likeliest one's")
    add("--repetition-penalty", type=float, default=argparse.SUPPRESS, help="over 1: avoid what was said before")
    add("--stop", action="append", default=argparse.SUPPRESS, help="end the answer before this text; repeatable")
    add("--ignore-eos", action="store_true", default=argparse.SUPPRESS, help="go on after the end-of-text token")


_SAMPLING_FIELDS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "ignore_eos",
)  # fmt: skip


def sampling_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that were given, by their names in `SamplingParams`."""
    return {name: value for name, value in vars(arguments).items() if name in _SAMPLING_FIELDS}
