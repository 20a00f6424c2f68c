"""Which quantized checkpoints can be read, and the refusal by name of those that cannot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Fp8BlockConfig
from .reader import ConfigReader, shown

SUPPORTED = "unquantized float32, bfloat16 or float16, and fp8 (e4m3) with weight_block_size"
# Files beside config.json that only one quantization tool writes.
TOOL_FILES = {
    "quant_model_description*.json": "msModelSlim",
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}


def refusal(method: str, where: str, value: Any) -> ValueError:
    return ValueError(
        f"the quantization method {method} is not supported; supported checkpoints: {SUPPORTED}. "
        f"Use the unquantized or the fp8 block version of the model; {where}: {shown(value)}"
    )


def read_quantization(raw: Mapping[str, Any]) -> Fp8BlockConfig | None:
    """The block sizes of an fp8 checkpoint, or None where the weights are not quantized.

    Raises ValueError naming the method for everything else (compressed-tensors, gptq, awq, bitsandbytes, mxfp4, …).
    """
    for key in ("compression_config", "sparsity_config"):
        if raw.get(key):
            raise refusal("compressed-tensors", key, raw[key])
    if raw.get("quantize"):  # msModelSlim's mark in config.json, e.g. "w8a8_dynamic"
        raise refusal("msModelSlim", "quantize", raw["quantize"])
    settings = ConfigReader(raw).object("quantization_config")
    if not settings:
        return None
    reader = ConfigReader(settings, "quantization_config in config.json")
    method = _method(settings)
    if method != "fp8":
        raise refusal(method, "quantization_config", method)
    block = settings.get("weight_block_size")
    if block is None:
        raise refusal("fp8 with one scale per tensor", "weight_block_size", None)
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**20 for size in block)
    ):
        raise reader.error("weight_block_size", "a list of two positive integers [rows, columns]")
    if str(reader.get("fmt") or "e4m3").lower() not in ("e4m3", "float8_e4m3fn"):
        raise refusal("fp8 in another format than e4m3", "fmt", settings["fmt"])
    if reader.string("activation_scheme", "dynamic") != "dynamic":
        raise refusal("fp8 with static activation scales", "activation_scheme", settings["activation_scheme"])
    return Fp8BlockConfig(block_rows=block[0], block_columns=block[1])


def refuse_tool_files(folder: Path) -> None:
    """Raises ValueError where a quantization tool left its mark beside config.json."""
    for pattern, tool in TOOL_FILES.items():
        for file in folder.glob(pattern):
            raise refusal(tool, "found in the folder", file.name)


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    if isinstance(method, str) and method:
        return method.lower()
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return "bitsandbytes"
    if "quant_algo" in settings or "producer" in settings:
        return "modelopt"
    if "config_groups" in settings:
        return "compressed-tensors"
    return "without a name (quantization_config has no quant_method)"
