"""The C++ kernels inside a compiled package: called directly, and equal to eager calls in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from omni_engine.ops.cpu.build import KernelsUnavailable, chosen_form, find_compiler

# One program for both processes: every op, and what the compiler itself makes in between.
PROGRAM = """
import sys, torch
from torch import nn
from omni_engine.ops.cpu import kernels
from omni_engine.ops.table import PLAIN, cpu_table

class Step(nn.Module):
    def __init__(self, table):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        def weight(*shape):
            return nn.Parameter(torch.randn(shape, generator=generator) / shape[-1] ** 0.5, requires_grad=False)
        self.table = table
        self.qkv, self.bias, self.out, self.up = weight(64, 64), weight(64), weight(64, 64), weight(4, 24, 16)
        self.gate_up, self.down = weight(8, 64, 64), weight(8, 64, 32)

    def forward(self, x, keys, values, latents, rope_keys, blocks, lens, weights, ids):
        ops = self.table
        query = ops.linear(x, self.qkv, self.bias).view(-1, 4, 16)
        attended = ops.paged_decode_attention(query, keys, values, blocks, lens, 0.25, 7).flatten(1)
        x = x + ops.linear(attended, self.out)
        latent = ops.mla_decode_attention(
            ops.head_linear(query, self.up, False), query[..., :8], latents, rope_keys, blocks, lens, 0.2
        )
        x = x + ops.head_linear(latent, self.up, True).flatten(1)
        return ops.routed_experts(torch.tanh(x), weights, ids, self.gate_up, self.down)

generator = torch.Generator().manual_seed(1)
def randn(*shape):
    return torch.randn(shape, generator=generator)
inputs = (
    randn(3, 64), randn(10, 4, 2, 16), randn(10, 4, 2, 16), randn(10, 4, 1, 24), randn(10, 4, 1, 8),
    torch.randint(0, 10, (3, 5), generator=generator, dtype=torch.int32), torch.tensor([3, 20, 9], dtype=torch.int32),
    torch.rand(3, 2, generator=generator), torch.tensor([[0, 1], [3, 7], [1, 2]]),
)
table = cpu_table()
path = sys.argv[1]
"""
COMPILE = """
from omni_engine.ops.cpu.shims import c_shims
program = torch.export.export(Step(table), inputs, strict=False)
options = {"aot_inductor.custom_ops_to_c_shims": c_shims(), "aot_inductor.package_constants_in_so": True}
torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
"""
RUN = """
package = torch._inductor.aoti_load_package(path)
with torch.no_grad():
    result = package(*inputs)
    torch.testing.assert_close(result, Step(table)(*inputs))
    torch.testing.assert_close(result, Step(PLAIN)(*inputs))
try:
    package(*inputs[:5], inputs[5] + 10, *inputs[6:])
except RuntimeError as error:
    print(error)
"""


def run(code: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + code, str(path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.full
def test_a_package_calls_the_kernels_directly_and_equals_eager(tmp_path: Path) -> None:
    try:
        find_compiler()
        chosen_form()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    path = tmp_path / "step.pt2"
    run(COMPILE, path)
    assert "omni_cpu_paged_decode_attention" in run(RUN, path)  # an error inside is not lost
    with zipfile.ZipFile(path) as archive:
        (library,) = (name for name in archive.namelist() if name.endswith(".so"))
        assert b"omni_cpu_linear" in archive.read(library)
