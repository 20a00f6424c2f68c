"""The graph backends of an NPU: `torchair`, a graph of CANN's graph engine, and `npugraph_ex`, captured calls."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from ...ops.cache_folder import private_folder
from ..graphs.key import CacheKey
from ..graphs.runner import CaptureReport, GraphInputs, GraphKey, GraphRunner, GraphsFromTheStart, Program
from ..graphs.supply import GraphError

logger = logging.getLogger(__name__)
CODE_NAME = "compiled_module"  # TorchAir's name of the file with a graph's code
MANIFEST_NAME = "manifest.json"


def gear_function(program: Program, key: GraphKey) -> MethodType:
    """The program's forward as a function of one gear alone.

    TorchAir's cache keeps one graph per function and looks at no shape when it loads one, and torch.compile counts the
    graphs of a function against a limit. Both tell functions apart by their code, so each gear has its own.
    """
    forward = type(program).forward
    name = f"step_{key.num_requests}x{key.tokens_per_request}_{key.sampler}"
    code = forward.__code__.replace(co_name=name)
    return MethodType(FunctionType(code, forward.__globals__, name, forward.__defaults__, forward.__closure__), program)


class NpuGraphs(GraphsFromTheStart, ABC):
    """What both have in common: the steps of a graph that cannot be made run eager, or with `required` nothing
    starts."""

    name: str

    def __init__(self, required: bool = False) -> None:
        self.required = required
        self.errors: dict[GraphKey, str] = {}

    def start(self, runner: GraphRunner) -> None:
        for key in runner.keys:
            start = time.perf_counter()
            try:
                graph, from_cache = self.make(runner, key)
            except Exception as error:  # of the tracer, the converters, the graph engine or the runtime
                reason = " ".join(str(error).split())[:400]
                if self.required:
                    raise GraphError(
                        f"a graph cannot be made ({reason}); remedy that, or start without require_graph: {key}"
                    ) from error
                logger.warning("the steps of %s run eager, their graph cannot be made: %s", key, reason)
                self.errors[key] = reason
                continue
            seconds = time.perf_counter() - start
            runner.install(graph, CaptureReport(key, seconds, from_cache, 0.0 if from_cache else seconds))

    @abstractmethod
    def make(self, runner: GraphRunner, key: GraphKey) -> tuple[Callable[[], Tensor], bool]:
        """The graph of a gear, which has run once, and whether it was found compiled."""

    def demand(self, key: GraphKey) -> None:
        pass  # it has been tried


class TorchairGraphs(NpuGraphs):
    """The backend `torchair`: TorchAir lowers a step to one graph of CANN's graph engine, which compiles it and sinks
    it to the device whole. Lengths are tensors in it, and nothing is done per step but its launch.

    TorchAir's own cache keeps each graph in a folder named by its key. What lies there is executable code, and TorchAir
    reads it with a pickle reader that admits three classes of its own and with marshal. So the folder must be this
    user's alone, and the digest of the code is checked before it is read.
    """

    name = "torchair"

    def __init__(self, root: Path, cache_key: Callable[[GraphKey], CacheKey], required: bool = False) -> None:
        super().__init__(required)
        self.folder = root / "npu-graphs"
        self.cache_key = cache_key
        for folder in (root, self.folder):
            private_folder(folder)

    @torch.inference_mode()
    def make(self, runner: GraphRunner, key: GraphKey) -> tuple[Callable[[], Tensor], bool]:
        cache_key = self.cache_key(key)
        folder = private_folder(self.folder / cache_key.digest)
        was_there = _is_sound(folder)
        if not was_there:
            shutil.rmtree(folder)
            private_folder(folder)
        # A function that TorchAir loads has no defaults any more, so the lengths that are not used are named.
        program, inputs = runner.program(key), (*runner.inputs(key), None)
        run = self._compiled(program, key, folder)
        run(*inputs)  # all rows are the null row here, so this changes nothing that anybody reads
        if not was_there and _seal(folder, cache_key):
            # The compiled function asks of all weights, before each step, whether they are still the same; a loaded one
            # asks nothing.
            run = self._compiled(program, key, folder)
            run(*inputs)
        return lambda: run(*inputs), was_there

    def _compiled(self, program: Program, key: GraphKey, folder: Path) -> Callable[..., Tensor]:
        from torchair.inference import cache_compile  # pyright: ignore[reportMissingImports]

        step = gear_function(program, key)
        return cache_compile(step, config=torchair_config(), dynamic=False, cache_dir=str(folder), ge_cache=True)


def torchair_config() -> Any:
    """TorchAir's configuration of a decode step: mode max-autotune, for static shapes."""
    import torchair  # pyright: ignore[reportMissingImports]

    config = torchair.CompilerConfig()
    config.experimental_config.frozen_parameter = True  # addresses of weights never change
    config.experimental_config.tiling_schedule_optimize = True  # attention's tiling is computed on the device
    return config


def _code_file(folder: Path) -> Path | None:
    return next(iter(sorted(folder.rglob(CODE_NAME))), None)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _seal(folder: Path, key: CacheKey) -> bool:
    """Note what was compiled. False where TorchAir kept nothing, for it does not keep every graph."""
    code = _code_file(folder)
    if code is None:
        logger.warning("TorchAir keeps no compiled graph; the next start compiles anew: %s", folder)
        return False
    manifest = {"code": str(code.relative_to(folder)), "sha256": _digest(code), "key": key.fields}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return True


def _is_sound(folder: Path) -> bool:
    """Whether there is a graph that may be loaded; one that is not what was stored is told of."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        code = folder / manifest["code"]
        if code == _code_file(folder) and _digest(code) == manifest["sha256"]:
            return True
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        pass
    logger.warning("a compiled graph is not what was stored, and is compiled anew: %s", folder)
    return False


class NpugraphExGraphs(NpuGraphs):
    """The backend `npugraph_ex`: the calls of a step are captured at the start and replayed, after torch-npu's own
    passes over the traced step.

    Fused attention takes its lengths as numbers here. They are symbols of the traced step; before each replay the tasks
    of attention are given the new ones, which torch-npu does wherever such a symbol reaches the operator.
    """

    name = "npugraph_ex"

    @torch.inference_mode()
    def make(self, runner: GraphRunner, key: GraphKey) -> tuple[Callable[[], Tensor], bool]:
        inputs = runner.inputs(key)
        runner.graphs_take_lengths = True
        run = torch.compile(
            gear_function(runner.program(key), key),
            backend="npugraph_ex",
            fullgraph=True,
            dynamic=False,
            # The inputs are the same tensors in every step, so that none must be copied to where it was captured.
            options={"frozen_parameter": True, "clone_input": False},
        )
        call = _with_lengths(run, inputs, key)
        runner.lengths = [key.tokens_per_request] * key.num_requests
        sources = ",".join(_sources(key))
        with (
            torch.compiler.config.patch(dynamic_sources=sources),  # pyright: ignore[reportAttributeAccessIssue]
            _results_may_be_given(),
        ):
            call(runner.lengths)
        return lambda: call(runner.lengths), False


@contextmanager
def _results_may_be_given() -> Iterator[None]:
    """Without torch's complaint, at the first call of a graph, of operators that return one of their arguments.

    torch-npu's passes call operators by their form that writes to a given result and returns it. torch takes that for
    an alias which the operator's schema hides: it warns, and with the variable CI set it refuses.
    """
    from torch._functorch import config

    known = hasattr(config, "error_on_custom_op_aliasing")  # not in every version of torch
    with (
        config.patch(error_on_custom_op_aliasing=False) if known else nullcontext(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*The output of this custom operator", category=UserWarning)
        yield


def _sources(key: GraphKey) -> list[str]:
    """What torch.compile calls the lengths."""
    return [f"L['lengths'][{index}]" for index in range(key.num_requests)]


def _with_lengths(run: Callable[..., Tensor], inputs: GraphInputs, key: GraphKey) -> Callable[[list[int]], Tensor]:
    def call(lengths: list[int]) -> Tensor:
        assert len(lengths) == key.num_requests
        return run(*inputs, lengths).clone()  # the next replay writes to the same memory

    return call
