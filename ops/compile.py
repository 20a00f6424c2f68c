"""Programs of tensors as compiled packages: exported and compiled by AOTInductor, loaded and called without guards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def compile_package(program: nn.Module, inputs: tuple[Any, ...], path: Path, *, num_threads: int) -> None:
    """Compile `program(*inputs)`, whose shapes are all fixed, into a package file.

    Parameters and buffers are not stored: whoever loads the package brings them. Tensors that the program writes in
    place are written in place. `num_threads` is the number of threads the compiled code runs on. Nothing is computed,
    so inputs and weights may be memory that nobody has touched. Raises what torch.export and Inductor raise.
    """
    from torch._inductor import aoti_compile_and_package

    from .cpu.shims import c_shims

    with torch.no_grad():
        exported = torch.export.export(program, inputs, strict=False)
        aoti_compile_and_package(
            exported,
            package_path=str(path),
            inductor_configs={
                "aot_inductor.package_constants_in_so": False,
                "always_keep_tensor_constants": True,
                "aot_inductor.custom_ops_to_c_shims": c_shims(),
                "cpp.threads": num_threads,
            },
        )


class CompiledPackage:
    """A package bound to the tensors it works on. Calling it takes Python's lock only to begin and to end."""

    def __init__(self, path: Path, program: nn.Module, inputs: list[Tensor]) -> None:
        """Load a package of `compile_package` that was made from an equal `program` and inputs of these shapes.

        inputs: what the program is called with, flattened. The weights are shared with `program` and not copied.
        """
        from .cpu.build import load_kernels

        load_kernels()
        tensors: dict[str, Tensor] = dict(program.named_parameters(remove_duplicate=False))
        tensors |= dict(program.named_buffers(remove_duplicate=False))
        self._package = torch.classes.omni.Package(str(path))
        names = self._package.constant_names()
        self._package.bind({name: tensors[name] for name in names}, inputs)

    def __call__(self) -> Tensor:
        """Run once on the bound tensors -> the program's output, in memory of its own."""
        return self._package.run()
