"""Which decode steps become graphs, and by which backend: read from the engine's arguments, torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

BACKEND_VARIABLE = "OMNI_ENGINE_GRAPH_BACKEND"  # the backend that auto stands for

GRAPH_BACKENDS = ("auto", "eager", "inductor", "cudagraph", "torchair", "npugraph_ex")
NPU_BACKENDS = ("torchair", "npugraph_ex")
# Six sizes, so that a first start compiles for minutes and not for an hour; a step of 3 costs about what one of 4 does.
COMPILED_GEARS = (1, 4, 8, 16, 32, 64)
GPU_GEARS = (1, 2, 4, *range(8, 257, 8))
MAX_GEAR = 4096
_KEYS = ("mode", "level", "cudagraph_mode", "cudagraph_capture_sizes", "max_cudagraph_capture_size", "cache_dir")
_CUDAGRAPH_MODES = ("NONE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")


class GraphArgs(Protocol):
    """The fields of `EngineArgs` that are read here."""

    enforce_eager: bool
    graph_backend: str
    cudagraph_capture_sizes: list[int] | None
    max_cudagraph_capture_size: int | None
    compilation_config: dict[str, Any]
    require_graph: bool


@dataclass(frozen=True)
class GraphChoice:
    """What the arguments say, before device and batch size are known."""

    enabled: bool
    backend: str  # one of GRAPH_BACKENDS
    gears: tuple[int, ...] | None  # None: the device's default
    largest: int | None
    required: bool
    cache_dir: Path | None = None  # where compiled graphs are kept; None: in the usual cache folder


def choose_graphs(args: GraphArgs) -> GraphChoice:
    """Read and check the arguments; ValueError with what to change. `compilation_config` has vLLM's spelling.

    Mode 0 and cudagraph_mode NONE mean eager. A mode over 0 and the FULL modes all mean one graph for the whole decode
    step; prefill is eager in each of them. There is no piecewise mode, and none is pretended.
    """
    config = args.compilation_config
    unknown = [key for key in config if key not in _KEYS]
    if unknown:
        raise ValueError(f"compilation_config supports {', '.join(_KEYS)}; not supported: {', '.join(unknown)}")
    mode = config.get("mode", config.get("level"))
    if mode is not None and (isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode <= 3):
        raise ValueError(f"compilation_config.mode must be 0 (eager) to 3: {mode}")
    full = config.get("cudagraph_mode")
    if full is not None and full not in _CUDAGRAPH_MODES:
        raise ValueError(f"compilation_config.cudagraph_mode must be one of {', '.join(_CUDAGRAPH_MODES)}: {full}")
    sizes = args.cudagraph_capture_sizes
    if sizes is None:
        sizes = config.get("cudagraph_capture_sizes")
    largest = args.max_cudagraph_capture_size
    if largest is None:
        largest = config.get("max_cudagraph_capture_size")
    if largest is not None and (isinstance(largest, bool) or not isinstance(largest, int) or largest < 1):
        raise ValueError(f"max_cudagraph_capture_size must be a positive integer: {largest}")
    cache_dir = config.get("cache_dir") or None
    if cache_dir is not None and not isinstance(cache_dir, str):
        raise ValueError(f"compilation_config.cache_dir must be the path of a folder: {cache_dir}")
    backend = args.graph_backend
    if backend == "auto":
        backend = os.environ.get(BACKEND_VARIABLE) or "auto"
        if backend not in GRAPH_BACKENDS:
            raise ValueError(f"{BACKEND_VARIABLE} must be one of {', '.join(GRAPH_BACKENDS)}: {backend}")
    eager = args.enforce_eager or mode == 0 or full == "NONE"
    if args.require_graph and eager:
        raise ValueError("require_graph contradicts enforce_eager, mode 0 and cudagraph_mode NONE; drop one: True")
    return GraphChoice(
        enabled=not eager,
        backend=backend,
        gears=None if sizes is None else _check_gears(sizes),
        largest=largest,
        required=args.require_graph,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )


@dataclass(frozen=True)
class GraphConfig:
    """The graphs of one rank. No gears: every step is eager."""

    backend: str  # eager | inductor | cudagraph | torchair | npugraph_ex
    gears: tuple[int, ...]
    required: bool = False


def resolve_graphs(choice: GraphChoice, device_type: str, max_num_seqs: int) -> GraphConfig:
    """The backend and the gears on this device; ValueError where the device has no such backend."""
    backend = choice.backend
    if backend == "auto":
        backend = {"cuda": "cudagraph", "npu": "torchair"}.get(device_type, "inductor")
    if not choice.enabled:
        return GraphConfig(backend, ())
    if backend == "cudagraph" and device_type != "cuda":
        raise ValueError(f"graph_backend cudagraph needs an NVIDIA GPU; use inductor or auto on: {device_type}")
    if backend == "inductor" and device_type != "cpu":
        raise ValueError(f"graph_backend inductor is for the CPU; use auto on: {device_type}")
    if backend in NPU_BACKENDS and device_type != "npu":
        raise ValueError(f"graph_backend {backend} needs an Ascend NPU; use auto on: {device_type}")
    largest = min(choice.largest or max_num_seqs, max_num_seqs)
    if choice.gears is not None:
        too_large = [gear for gear in choice.gears if gear > max_num_seqs]
        if too_large:
            raise ValueError(
                f"cudagraph_capture_sizes must not be above max_num_seqs={max_num_seqs}; lower them or raise it: "
                f"{too_large[0]}"
            )
        return GraphConfig(backend, tuple(gear for gear in choice.gears if gear <= largest), choice.required)
    defaults = GPU_GEARS if device_type == "cuda" else COMPILED_GEARS
    gears = [gear for gear in defaults if gear <= largest]
    if largest < defaults[-1] and largest not in gears:
        gears.append(largest)  # a batch that is as large as it gets has its graph
    return GraphConfig(backend, tuple(gears), choice.required)


def _check_gears(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, (list, tuple)) or not sizes:
        raise ValueError(f"cudagraph_capture_sizes must be a list of batch sizes (enforce_eager for none): {sizes}")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_GEAR:
            raise ValueError(f"cudagraph_capture_sizes must hold batch sizes from 1 to {MAX_GEAR}: {size}")
    return tuple(sorted(set(sizes)))
