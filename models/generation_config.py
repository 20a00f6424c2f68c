"""Default sampling parameters and extra end-of-sequence ids that a model brings in generation_config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, read_json
from .config_parsers.reader import ConfigReader

FILE_NAME = "generation_config.json"
# The keys vLLM takes from the file, with the name of the sampling parameter and whether it is an integer.
SAMPLING_KEYS = {
    "repetition_penalty": ("repetition_penalty", False),
    "temperature": ("temperature", False),
    "top_k": ("top_k", True),
    "top_p": ("top_p", False),
    "min_p": ("min_p", False),
    "max_new_tokens": ("max_tokens", True),
}


def sampling_defaults(
    checkpoint: Checkpoint, source: str = "auto", overrides: Mapping[str, Any] | None = None
) -> dict[str, float | int]:
    """Sampling parameters, by SamplingParams' names, that a request gets where it says nothing.

    `source`: auto (the model's own file, if there is one), vllm (none), or a folder that has the file. `overrides`
    (--override-generation-config) go before it, with any source. Keys other than vLLM's six are left alone.
    Raises ValueError for a wrong type or an override of another name, FileNotFoundError for a folder without the file.
    """
    for key in overrides or {}:
        if key not in SAMPLING_KEYS:
            raise ValueError(f"override_generation_config takes {', '.join(SAMPLING_KEYS)}, not: {key}")
    settings = {} if source == "vllm" else dict(_read(checkpoint, source))
    reader = ConfigReader(settings | dict(overrides or {}), FILE_NAME)
    defaults: dict[str, float | int] = {}
    for key, (name, is_integer) in SAMPLING_KEYS.items():
        if reader.get(key) is not None:
            defaults[name] = reader.integer(key, minimum=-1) if is_integer else reader.number(key, above=-math.inf)
    return defaults


def extra_eos_token_ids(checkpoint: Checkpoint, source: str = "auto") -> tuple[int, ...]:
    """Ids of generation_config.json's eos_token_id, an integer or a list; they end a sequence beside config.json's.

    The source vllm leaves out sampling defaults only: the model's own ids still count, as they do in vLLM.
    """
    return ConfigReader(_read(checkpoint, source), FILE_NAME).integers("eos_token_id")


def _read(checkpoint: Checkpoint, source: str) -> Mapping[str, Any]:
    if source in ("auto", "vllm"):
        return checkpoint.generation_config or {}
    file = Path(source).expanduser() / FILE_NAME
    if not file.is_file():
        raise FileNotFoundError(f"generation_config must be auto, vllm or a folder that holds {FILE_NAME}: {source}")
    return read_json(file)
