"""What the graph compiler must be told so that compiled code calls the C++ kernels directly."""

from __future__ import annotations

from typing import Any

import torch

from . import build

_TENSOR, _RESULT = "AtenTensorHandle", "AtenTensorHandle*"
# The arguments of each op between its name and its result, as the compiler passes them.
_ARGUMENTS = {
    "linear": (_TENSOR, _TENSOR, "AtenTensorHandle*"),
    "head_linear": (_TENSOR, _TENSOR, "int32_t"),
    "paged_decode_attention": (*[_TENSOR] * 5, "double", "int64_t"),
    "mla_decode_attention": (*[_TENSOR] * 6, "double"),
    "routed_experts": (_TENSOR,) * 5,
}


def c_shims() -> dict[Any, list[str]]:
    """The value of Inductor's option `aot_inductor.custom_ops_to_c_shims` for the ops of this package.

    Compiled code calls an op of name N as `aoti_torch_cpu_N`. That name leaves out the library `omni`, so it is bound
    to our own symbol `omni_cpu_N`, which no release of torch can come to define. A package compiled with it can only be
    loaded after `build.load_kernels`, which makes the symbols visible. Raises KernelsUnavailable.
    """
    build.load_kernels()
    return {
        getattr(torch.ops.omni, name).default: [
            f'AOTITorchError aoti_torch_cpu_{name}({", ".join((*arguments, _RESULT))}) __asm__("omni_cpu_{name}")'
        ]
        for name, arguments in _ARGUMENTS.items()
    }
