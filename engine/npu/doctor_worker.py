"""One group of the doctor's checks as a process of its own, which an operator may crash: `python -m
omni_engine.engine.npu.doctor_worker FD GROUP FIRST DEVICE`.

FIRST is the check to begin with, DEVICE `npu` or `simulated`. Lines of JSON go to the inherited FD: the names of the
checks, the beginning and end of each, and what CANN was asked. The process ends early after an error of the device,
which leaves it in doubt; the parent starts another for the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .doctor import DEVICE_GROUP
from .simulated import load_simulated_npu

if TYPE_CHECKING:
    import torch

    from ...ops.npu.op_checks import OpCase
    from .model_checks import ModelCase

DETAIL_CHARACTERS = 600
_PACKAGE = Path(__file__).parents[2]


class Reported(Exception):
    """A check's finding that it is wrong; the device is not in doubt."""


@dataclass(frozen=True)
class Bench:
    """Where checks run."""

    device: torch.device
    is_simulated: bool  # nothing is computed, so results say nothing
    compile: Callable[[Callable[..., Any]], Callable[..., Any]]  # into a graph of the graph engine

    def compared(self, error: Callable[[], float], bound: float) -> str:
        """The words for a result that is right; where nothing was computed it is not looked at. Raises Reported."""
        if self.is_simulated:
            return ""
        found = error()
        if not found <= bound:
            raise Reported(f"relative error {found:.2g}, allowed is {bound:.2g}")
        return f"relative error {found:.2g} of {bound:.2g}"


Check = tuple[str, Callable[[Bench], str]]  # what it returns is worth telling


def eager_check(make: Callable[[], OpCase | ModelCase]) -> Callable[[Bench], str]:
    """Call the operator, and compare."""

    def run(bench: Bench) -> str:
        import torch

        case = make()
        function, inputs = case.prepare(bench.device, False)
        with torch.inference_mode():
            results = function(*inputs)
        return bench.compared(lambda: case.error(results, inputs), case.bound)

    return run


def graph_check(make: Callable[[], OpCase | ModelCase], again: bool = False) -> Callable[[Bench], str]:
    """Call the operator in a graph, and compare. `again`: a second time too, which must not make another graph, in a
    step that leaves what it read as it was."""

    def run(bench: Bench) -> str:
        import torch

        case = make()
        function, inputs = case.prepare(bench.device, True)
        torch._dynamo.reset()
        compiled = bench.compile(function)
        with torch.no_grad():
            results = compiled(*inputs)
            if again:
                with torch.compiler.set_stance("fail_on_recompile"):
                    results = compiled(*inputs)
        return bench.compared(lambda: case.error(results, inputs), case.bound)

    return run


# --- the device itself ---


def _imports(bench: Bench) -> str:
    import torch
    import torch_npu  # pyright: ignore[reportMissingImports]

    return f"torch {torch.__version__}, torch-npu {torch_npu.__version__}"


def _devices(bench: Bench) -> str:
    import torch

    npu: Any = torch.npu  # pyright: ignore[reportAttributeAccessIssue]
    count = npu.device_count()
    if not count:
        raise Reported("torch-npu finds no device; `npu-smi info` must list some, and this user must be let in")
    free, total = npu.mem_get_info(bench.device)
    return f"{count} of {npu.get_device_name(0)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free on the first"


def _copies(bench: Bench) -> str:
    import torch

    numbers = torch.arange(4096)
    result = numbers.to(bench.device).cpu()
    return bench.compared(lambda: _unequal(result, numbers), 0.0)


def _arithmetic(bench: Bench) -> str:
    import torch

    left, right = torch.arange(1, 4097).float(), torch.arange(4096).flip(0).float()
    result = (left.to(bench.device) * 2 + right.to(bench.device)).cpu()
    return bench.compared(lambda: _unequal(result, left * 2 + right), 0.0)


def _replay(bench: Bench) -> str:
    """A captured graph computes anew from what its buffers hold."""
    import torch

    npu: Any = torch.npu  # pyright: ignore[reportAttributeAccessIssue]
    buffer = torch.ones(4096, device=bench.device)
    graph = npu.NPUGraph()
    with npu.graph(graph):
        doubled = buffer * 2
    buffer.fill_(3)
    graph.replay()
    npu.synchronize()
    return bench.compared(lambda: _unequal(doubled.cpu(), torch.full((4096,), 6.0)), 0.0)


def _communicator(bench: Bench) -> str:
    """A group of one rank: HCCL is there, and its communicator has the name that expert parallelism asks for."""
    import torch
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("hccl", rank=0, world_size=1, init_method=f"file://{folder}/store")
        try:
            group: Any = dist.distributed_c10d._get_default_group()
            name = group._get_backend(torch.device("npu")).get_hccl_comm_name(0)
            numbers = torch.ones(16, device=bench.device)
            dist.all_reduce(numbers)
            summed = numbers.cpu()
        finally:
            dist.destroy_process_group()
    if not name:
        raise Reported("the communicator has no name")
    return bench.compared(lambda: _unequal(summed, torch.ones(16)), 0.0)


def _unequal(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The share of elements that are not what they should be."""
    return float((result != expected).double().mean())


DEVICE_CHECKS: tuple[Check, ...] = (
    ("import torch and torch-npu", _imports),
    ("devices", _devices),
    ("copies to the device and back", _copies),
    ("arithmetic", _arithmetic),
    ("capture and replay", _replay),
    ("an HCCL communicator of one rank", _communicator),
)


def group_checks(group: str) -> list[Check]:
    """The checks of a group, in order. Imports torch but for the first group, whose first check that is."""
    if group == DEVICE_GROUP:
        return list(DEVICE_CHECKS)
    from ...ops.npu.op_checks import op_checks
    from .model_checks import MODEL_GROUPS

    if group in MODEL_GROUPS:
        return [(f"{name}, graph", graph_check(make, "split" in name)) for name, make in MODEL_GROUPS[group]]
    checks: list[Check] = []
    for check in op_checks():
        if check.group == group:
            checks += [
                (f"{check.name}, eager", eager_check(check.make)),
                (f"{check.name}, graph", graph_check(check.make)),
            ]
    return checks


def prepare(is_simulated: bool, tell: Callable[[dict[str, Any]], None]) -> Bench:
    """torch-npu and TorchAir loaded, with what CANN is asked overheard."""
    import torch
    import torch_npu  # pyright: ignore[reportMissingImports]  # which makes the device's name known
    import torchair  # pyright: ignore[reportMissingImports]

    if is_simulated:
        from ...ops.npu.simulator import graphs  # noqa: F401  # stands in for CANN's graph engine from now on
    from ...ops.npu import cann_questions, library

    device = torch.device("npu:0")
    library.load(device)
    # Ops go through aclnn and not through the older operator library; NZ is kept as NZ.
    torch_npu.npu.config.allow_internal_format = True
    torch_npu.npu.set_compile_mode(jit_compile=False)
    cann_questions.listen(lambda question: tell({"question": asdict(question)}))

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        configuration = torchair.CompilerConfig()
        configuration.experimental_config.frozen_parameter = True
        backend = torchair.get_npu_backend(compiler_config=configuration)
        return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)

    return Bench(device, is_simulated, compile)


def run_checks(
    checks: list[Check], first: int, bench: Callable[[], Bench], tell: Callable[[dict[str, Any]], None]
) -> None:
    """Runs checks from `first` on, telling of each; stops after an error that leaves the device in doubt."""
    for index in range(first, len(checks)):
        tell({"begin": index})
        status, detail, in_doubt = "pass", "", False
        try:
            place = bench()
            detail = checks[index][1](place)
            if place.is_simulated:
                status = "ran"
        except Reported as finding:
            status, detail = "fail", str(finding)
        except Exception as error:
            status, detail = "fail", _told(error)
            in_doubt = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
        tell({"end": index, "status": status, "detail": detail})
        if in_doubt:
            return


def _told(error: Exception) -> str:
    """The kind of an error, where in the package it came through, and on one line its text and its cause's."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the caller's own
    places = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    where = f" at {Path(places[-1].filename).name}:{places[-1].lineno}" if places else ""
    text = f"{type(error).__name__}{where}: {error}"
    if error.__cause__ is not None:
        text += f" (because of {type(error.__cause__).__name__}: {error.__cause__})"
    return " ".join(text.split())[:DETAIL_CHARACTERS]


@contextlib.contextmanager
def telling(descriptor: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What is told goes out at once: the process may be gone in the next moment."""

    def tell(message: dict[str, Any]) -> None:
        os.write(descriptor, json.dumps(message).encode() + b"\n")

    try:
        yield tell
    finally:
        os.close(descriptor)


def main(words: list[str]) -> None:
    descriptor, group, first, device = int(words[0]), words[1], int(words[2]), words[3]
    made: list[Bench] = []

    def bench() -> Bench:
        if not made:
            made.append(prepare(device == "simulated", tell))
        return made[0]

    with telling(descriptor) as tell:
        try:
            if device == "simulated":
                load_simulated_npu()
            checks = group_checks(group)
        except Exception as error:
            tell({"start": _told(error)})
            return
        tell({"checks": [name for name, _ in checks]})
        run_checks(checks, first, bench, tell)
    sys.stdout.flush()
    os._exit(0)  # the runtime's own teardown is no part of a check, and has been seen to crash


if __name__ == "__main__":
    main(sys.argv[1:])
