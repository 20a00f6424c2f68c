"""Lowers functions through the shipped TorchAir and records the graphs that it would hand to CANN's graph engine.

Only what lies below TorchAir's Python is replaced: the session that loads, compiles and runs a graph, and the two
questions it asks of the installed CANN, whether it knows an optional input or attribute and whether it has an operator
at all. Both are answered with yes and noted, to be verified on the first real machine. Tracing, meta kernels,
functionalization, the passes over both graphs and the converters are the shipped code.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_npu  # pyright: ignore[reportMissingImports]
import torchair  # pyright: ignore[reportMissingImports]
from torchair._ge_concrete_graph import compat_ir, fx2ge_converter  # pyright: ignore[reportMissingImports]
from torchair.core import _backend  # pyright: ignore[reportMissingImports]
from torchair.ge import ge_custom  # pyright: ignore[reportMissingImports]
from torchair.ge._ge_graph import (  # pyright: ignore[reportMissingImports]
    _ge_proto_dtype_to_ge_dtype,
    ge_type_to_torch_type,
)

# Ends and constants of a graph, which say nothing about what it computes.
FRAME = ("Data", "RefData", "Const", "ConstPlaceHolder", "NetOutput")
# Nodes that move a whole tensor without changing it; one behind a cache would copy it every step.
STREAM = "_user_stream_label"
COPIES = ("TensorMove", "TensorMoveV2", "Assign", "ViewCopy", "Identity")


@dataclass(frozen=True)
class Node:
    """One operator of a lowered graph. Between the ends a graph has no shapes: the graph engine infers them."""

    type: str
    name: str
    inputs: tuple[str, ...]  # producers, as "name:output"; "" where an optional input is absent
    attributes: dict[str, Any]
    constant: torch.Tensor | None = None
    stream: str = ""  # of its own; "": the graph's


@dataclass(frozen=True)
class Input:
    """What a graph is given."""

    index: int
    shape: tuple[int, ...]
    format: int  # of storage: 2 is ND, 29 is NZ
    mutated: bool  # the graph writes it in place
    frozen: bool  # a weight, whose address never changes


@dataclass(frozen=True)
class Lowered:
    """A graph as TorchAir hands it over."""

    nodes: tuple[Node, ...]
    inputs: dict[str, Input]  # by the name of their node
    options: dict[str, str]
    addresses: list[int] = field(default_factory=list)  # of the inputs, by index, once the graph has been called

    @property
    def work(self) -> Counter[str]:
        """How many nodes of each type there are, without inputs, constants and the output."""
        return Counter(node.type for node in self.nodes if node.type not in FRAME)

    @property
    def copies(self) -> list[Node]:
        return [node for node in self.nodes if node.type in COPIES]

    @property
    def copied_inputs(self) -> list[str]:
        """The inputs that stand directly before a copy."""
        sources = [source.rsplit(":", 1)[0] for node in self.copies for source in node.inputs]
        return [source for source in sources if source in self.inputs]

    @property
    def mutated(self) -> list[tuple[int, ...]]:
        """Shapes of the inputs that the graph writes in place, in order."""
        return [one.shape for one in sorted(self.inputs.values(), key=lambda one: one.index) if one.mutated]

    def only(self, kind: str) -> Node:
        """The node of this type; ValueError unless there is exactly one."""
        (node,) = [node for node in self.nodes if node.type == kind]
        return node


@dataclass
class Asked:
    """What TorchAir asked of the installed CANN and was told to be there."""

    optional: set[tuple[str, tuple[str, ...], tuple[str, ...]]] = field(default_factory=set)
    operators: set[str] = field(default_factory=set)


asked = Asked()
_lowered: list[Lowered] = []
_in_place: list[list[int]] = []  # of each graph optimised, the inputs it writes


class _Session:
    """Stands where TorchAir's graph session does: keeps what it is given, and answers a run with zeros."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def load(self, graph: Any, options: dict[str, str] | None = None) -> None:
        self.graph = graph
        self.lowered = _read(graph, _in_place[-1], dict(options or {}))
        _lowered.append(self.lowered)

    def compile(self) -> None:
        pass

    def run(self, inputs: Any, assigned_outputs: Any = (), stream: Any = None) -> list[torch.Tensor]:
        if not self.lowered.addresses:
            self.lowered.addresses.extend(tensor.data_ptr() for tensor in inputs)
        dtypes = self.graph.attr["_output_dtypes"].list.i
        (end,) = [operator for operator in self.graph.op if operator.type == "NetOutput"]
        device = inputs[0].device if inputs else torch.device("cpu")
        outputs = []
        for index, (dtype, description) in enumerate(zip(dtypes, end.input_desc, strict=False)):
            assigned = assigned_outputs[index] if index < len(assigned_outputs) else None
            zeros = torch.zeros(list(description.shape.dim), dtype=ge_type_to_torch_type(dtype), device=device)
            outputs.append(zeros if assigned is None else assigned)
        return outputs


def _value(attribute: Any) -> Any:
    kind = attribute.WhichOneof("value")
    value: Any = getattr(attribute, kind) if kind else None
    if kind == "s":
        return value.decode(errors="replace")
    if kind == "list":
        return list(value.i) or list(value.s) or list(value.f) or list(value.b)
    return value if isinstance(value, (bool, int, float)) else None


def _constant(attribute: Any) -> torch.Tensor:
    description, data = attribute.t.desc, bytearray(attribute.t.data)
    dtype = ge_type_to_torch_type(_ge_proto_dtype_to_ge_dtype(description.dtype))
    shape = list(description.shape.dim)
    return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def _read(graph: Any, in_place: list[int], options: dict[str, str]) -> Lowered:
    nodes, inputs = [], {}
    frozen = [flag == "1" for flag in options.get("frozenInput", "").split(",")]
    for operator in graph.op:
        attributes = {key: _value(operator.attr[key]) for key in operator.attr if not key.startswith("_")}
        constant = _constant(operator.attr["value"]) if operator.type == "Const" else None
        stream = _value(operator.attr[STREAM]) if STREAM in operator.attr else ""
        nodes.append(Node(operator.type, operator.name, tuple(operator.input), attributes, constant, stream or ""))
        if operator.type in ("Data", "RefData"):
            (description,) = operator.output_desc
            shape, index = tuple(description.shape.dim), attributes["index"]
            if any(size < 0 for size in shape):
                raise ValueError(f"a static graph has an input of unknown size: {operator.name} {shape}")
            inputs[operator.name] = Input(
                index, shape, description.attr["format_for_int"].i, index in in_place, any(frozen[index : index + 1])
            )
    return Lowered(tuple(nodes), inputs, options)


def _cann_knows(optype: str, runtime_optional_inputs: Any, runtime_optional_attrs: Any) -> str:
    asked.optional.add((optype, tuple(runtime_optional_inputs), tuple(runtime_optional_attrs)))
    return ""  # no complaint


class _Registry:
    """The C extension, but for the question whether CANN has an operator."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extension, name)

    def get_registered_ir_def(self, operator: str) -> tuple[str, list[Any], list[Any], list[Any]]:
        asked.operators.add(operator)
        return "SUCCESS", [], [], []


def _install() -> None:
    _backend.TorchNpuGraph = _Session
    _backend.initialize_graph_engine = fx2ge_converter.initialize_graph_engine = lambda *arguments, **options: None
    compat_ir.is_cann_compat = _cann_knows
    ge_custom._torchair = _Registry(ge_custom._torchair)
    optimize = fx2ge_converter.GeConcreteGraph.optimize_graph_without_runtime

    def noting(self: Any, *arguments: Any, **options: Any) -> Any:
        result = optimize(self, *arguments, **options)
        _in_place.append(list(self._ref_data_idx))
        return result

    fx2ge_converter.GeConcreteGraph.optimize_graph_without_runtime = noting
    logging.getLogger("torchair").setLevel(logging.ERROR)
    # Ops go through aclnn and not through the older operator library, which a captured graph refuses.
    torch_npu.npu.config.allow_internal_format = True
    torch_npu.npu.set_compile_mode(jit_compile=False)


_install()


def lower_all(function: Callable[..., Any], *calls: tuple[Any, ...], **settings: Any) -> list[Lowered]:
    """Compiles `function` for static shapes, calls it with each of `calls`, and returns every graph that this made.

    `settings` are attributes of TorchAir's experimental configuration, e.g. frozen_parameter=True. Raises whatever
    tracing or lowering raises: a graph break is an error.
    """
    configuration = torchair.CompilerConfig()
    for name, value in settings.items():
        setattr(configuration.experimental_config, name, value)
    backend = torchair.get_npu_backend(compiler_config=configuration)
    _lowered.clear()
    _in_place.clear()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=False, fullgraph=True)
    with torch.no_grad():
        for arguments in calls:
            compiled(*arguments)
    return list(_lowered)


def lower(function: Callable[..., Any], *arguments: Any, **settings: Any) -> Lowered:
    """The one graph that a call of `function` lowers to; raises ValueError if there are more."""
    (graph,) = lower_all(function, arguments, **settings)
    return graph
