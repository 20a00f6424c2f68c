"""Graph engine forms of what TorchAir has no converter for, or a worse one.

That is the product with a weight as it lies, and the integer operations that the noise of sampling is made of.
TorchAir 2.13 has no converter for bitwise_xor of any kind, for `>>`, and for bitwise_and with a number. The graph
engine has the operators: BitwiseXor, RightShift (arithmetic on signed integers, like torch's) and BitwiseAnd.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from . import linear as _linear  # noqa: F401  # defines the op


@functools.cache
def register() -> None:
    """Teaches TorchAir the missing operations, once per process."""
    import torchair  # pyright: ignore[reportMissingImports]
    from torchair import ge  # pyright: ignore[reportMissingImports]

    def constant(value: Any, like: Any) -> Any:
        return value if isinstance(value, ge.Tensor) else ge.Const(value, dtype=like.dtype)

    def binary(operator: str, names: tuple[str, str], output: str, left: Any, right: Any) -> Any:
        inputs = dict(zip(names, (left, constant(right, left)), strict=True))
        return ge.custom_op(operator, inputs=inputs, outputs=[output])

    aten = torch.ops.aten

    @torchair.register_fx_node_ge_converter(torch.ops.omni_engine_npu.linear.default)
    def _(x: Any, weight: Any, meta_outputs: Any = None) -> Any:
        attributes = {"transpose_x1": ge.attr.Bool(False), "transpose_x2": ge.attr.Bool(True)}
        inputs = {"x1": x, "x2": weight, "bias": None}
        return ge.custom_op("MatMul", inputs=inputs, attrs=attributes, outputs=["y"])

    @torchair.register_fx_node_ge_converter(aten.bitwise_xor.Tensor)
    def _(self: Any, other: Any, meta_outputs: Any = None) -> Any:
        return binary("BitwiseXor", ("x1", "x2"), "y", self, other)

    @torchair.register_fx_node_ge_converter(aten.bitwise_and.Scalar)
    def _(self: Any, other: Any, meta_outputs: Any = None) -> Any:
        return binary("BitwiseAnd", ("x1", "x2"), "y", self, other)

    @torchair.register_fx_node_ge_converter(aten.__rshift__.Scalar)
    def _(self: Any, other: Any, meta_outputs: Any = None) -> Any:
        return binary("RightShift", ("x", "y"), "z", self, other)
