"""`--config file.yaml`: flags with their values in a file; and `--print-config`, which writes such a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.config import EngineArgs
from .arguments import CommandParser

_NOT_PRINTED = ("config", "print_config", "model_argument", "api_key")


def parse_with_config(parser: CommandParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse `words` over the values of the file that --config names, if there is one. Usage errors end the process."""
    first = parser.parse(words)
    if first.config is None:
        return first
    try:
        values = read_config(first.config)
    except ValueError as error:
        parser.error(str(error))
    defaults = {}
    for key, value in values.items():
        flag = f"--{key.replace('_', '-')}"
        action = parser.find_flag(flag)
        if value is not None:
            defaults[action.dest] = _convert(parser, action, flag, value)
    # On the command line the model may stand by position, which then goes before the file's.
    if first.model_argument is not None and "model" in defaults:
        del defaults["model"]
    parser.set_defaults(**defaults)
    return parser.parse(words)


def read_config(path: str) -> dict[str, Any]:
    """The mapping in a YAML file; raises ValueError."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the configuration cannot be read ({error.strerror}): {path}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"the configuration is not YAML ({' '.join(str(error).split())}): {path}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"the configuration must hold flags with their values, as in `port: 8000`: {path}")
    return values


def _convert(parser: CommandParser, action: argparse.Action, flag: str, value: Any) -> Any:
    """`value` as the command line would have given it."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            parser.error(f"in the configuration {flag} must be true or false: {value}")
        return value
    if action.nargs == "+":
        items = value if isinstance(value, list) else [value]
        return [_convert_one(parser, action, flag, item) for item in items]
    return _convert_one(parser, action, flag, value)


def _convert_one(parser: CommandParser, action: argparse.Action, flag: str, value: Any) -> Any:
    if isinstance(value, bool):
        parser.error(f"in the configuration {flag} takes a value, not: {str(value).lower()}")
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    try:
        converted = action.type(text) if callable(action.type) else text
    except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
        parser.error(f"in the configuration {flag} has a wrong value ({error}): {text}")
    if action.choices is not None and converted not in action.choices:
        parser.error(f"in the configuration {flag} must be one of {', '.join(map(str, action.choices))}: {text}")
    return converted


def config_text(arguments: argparse.Namespace, args: EngineArgs) -> str:
    """Every flag with its value, as YAML that --config reads. API keys are secrets and stay out."""
    import yaml

    values = {**vars(arguments), **dataclasses.asdict(args)}
    shown = {name.replace("_", "-"): value for name, value in sorted(values.items()) if name not in _NOT_PRINTED}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
