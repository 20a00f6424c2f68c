"""Times the C++ kernels against the plain torch bodies.

    python benchmarks/cpu_kernels.py [--op linear] [--threads 2] [--dtype bfloat16]

Both bodies of an op take turns in one run. Weights and caches rotate through more memory than the last-level cache
holds, as they do in a decode step. Times are medians over the turns; `--clock cpu` takes the processor time of all
threads, divided by their number, instead of the time on the wall, for machines that others use too. GB/s counts weights
and cached tokens once, GFLOP/s the multiplications and additions of the formula.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_engine.ops.cpu import build
from omni_engine.ops.table import PLAIN, OpTable, cpu_table

COLD_BYTES = 96 * 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Case:
    """One op at one shape: `call(table, turn)` works on another copy of the large tensors each turn."""

    op: str
    shape: str
    num_bytes: int
    num_flop: int
    call: Callable[[OpTable, int], Tensor]


def copies(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    """Random tensors that together are larger than the cache, at least two."""
    first = torch.randn(shape).div_(shape[-1] ** 0.5).to(dtype)
    return [first, *(first.clone() for _ in range(max(COLD_BYTES // (first.numel() * first.element_size()), 1)))]


def linear_cases(dtype: torch.dtype, rows: list[int]) -> Iterator[Case]:
    for inputs, outputs in [
        (768, 768),
        (768, 3072),
        (1024, 1024),
        (1024, 3072),
        (3072, 1024),
        (2048, 2048),
        (4096, 4096),
    ]:
        weights = copies(dtype, outputs, inputs)
        for count in rows:
            x = torch.randn(count, inputs).to(dtype)
            yield Case(
                "linear",
                f"{count} x {inputs} -> {outputs}",
                outputs * inputs * dtype.itemsize,
                2 * count * outputs * inputs,
                lambda table, turn, x=x, weights=weights: table.linear(x, weights[turn % len(weights)], None),
            )


def head_linear_cases(dtype: torch.dtype, rows: list[int]) -> Iterator[Case]:
    for heads, inner, rank in [(8, 64, 160), (16, 128, 512)]:
        weights = copies(dtype, heads, inner, rank)
        for count in rows:
            for transposed in (True, False):
                x = torch.randn(count, heads, inner if transposed else rank).to(dtype)
                yield Case(
                    "head_linear",
                    f"{count} x {heads} heads {'up' if transposed else 'down'} {inner} x {rank}",
                    heads * inner * rank * dtype.itemsize,
                    2 * count * heads * inner * rank,
                    lambda table, turn, x=x, weights=weights, transposed=transposed: table.head_linear(
                        x, weights[turn % len(weights)], transposed
                    ),
                )


def attention_cases(dtype: torch.dtype, rows: list[int]) -> Iterator[Case]:
    for (heads, kv_heads, dim), context in itertools.product(
        [(12, 12, 64), (16, 8, 128), (32, 8, 128)], [128, 1024, 8192]
    ):
        for count in rows:
            block_size, token_bytes = 16, 2 * kv_heads * dim * dtype.itemsize
            if count * context * token_bytes > 2**30:
                continue
            blocks = count * context // block_size
            sets = max(COLD_BYTES // (count * context * token_bytes), 1)
            keys = torch.randn(sets * blocks, block_size, kv_heads, dim).to(dtype)
            values = torch.randn(sets * blocks, block_size, kv_heads, dim).to(dtype)
            tables = [part.view(count, -1) for part in torch.randperm(sets * blocks).int().split(blocks)]
            query, lens = torch.randn(count, heads, dim).to(dtype), torch.full((count,), context, dtype=torch.int32)
            yield Case(
                "paged_decode_attention",
                f"{count} x {heads}/{kv_heads} heads of {dim}, context {context}",
                count * context * token_bytes,
                4 * count * context * heads * dim,
                lambda table, turn, query=query, keys=keys, values=values, tables=tables, lens=lens: (
                    table.paged_decode_attention(
                        query, keys, values, tables[turn % len(tables)], lens, query.shape[-1] ** -0.5, None
                    )
                ),
            )


def mla_cases(dtype: torch.dtype, rows: list[int]) -> Iterator[Case]:
    for (heads, rank, rope), context in itertools.product(
        [(8, 160, 32), (16, 512, 64), (128, 512, 64)], [128, 1024, 8192]
    ):
        for count in rows:
            block_size, token_bytes = 16, (rank + rope) * dtype.itemsize
            if count * context * heads * rank > 2**30:
                continue
            blocks = count * context // block_size
            sets = max(COLD_BYTES // (count * context * token_bytes), 1)
            latents = torch.randn(sets * blocks, block_size, 1, rank).to(dtype)
            keys = torch.randn(sets * blocks, block_size, 1, rope).to(dtype)
            tables = [part.view(count, -1) for part in torch.randperm(sets * blocks).int().split(blocks)]
            latent, query = torch.randn(count, heads, rank).to(dtype), torch.randn(count, heads, rope).to(dtype)
            lens = torch.full((count,), context, dtype=torch.int32)
            yield Case(
                "mla_decode_attention",
                f"{count} x {heads} heads of {rank} + {rope}, context {context}",
                count * context * token_bytes,
                2 * count * context * heads * (2 * rank + rope),
                lambda table, turn, latent=latent, query=query, latents=latents, keys=keys, tables=tables, lens=lens: (
                    table.mla_decode_attention(latent, query, latents, keys, tables[turn % len(tables)], lens, 0.05)
                ),
            )


def experts_cases(dtype: torch.dtype, rows: list[int]) -> Iterator[Case]:
    for experts, chosen, dim, inner in [(64, 6, 512, 256), (32, 8, 1024, 384), (16, 4, 2048, 1408)]:
        gate_ups, downs = copies(dtype, experts, 2 * inner, dim), copies(dtype, experts, dim, inner)
        for count in rows:
            ids = torch.rand(count, experts).topk(chosen, dim=-1).indices
            hidden, weights = torch.randn(count, dim).to(dtype), torch.rand(count, chosen)
            yield Case(
                "routed_experts",
                f"{count} x {dim}, {chosen} of {experts} experts of {inner}",
                ids.unique().numel() * 3 * inner * dim * dtype.itemsize,
                6 * count * chosen * inner * dim,
                lambda table, turn, hidden=hidden, weights=weights, ids=ids, gate_ups=gate_ups, downs=downs: (
                    table.routed_experts(hidden, weights, ids, gate_ups[turn % len(gate_ups)], downs[turn % len(downs)])
                ),
            )


CASES = {
    "linear": linear_cases,
    "head_linear": head_linear_cases,
    "paged_decode_attention": attention_cases,
    "mla_decode_attention": mla_cases,
    "routed_experts": experts_cases,
}


def measure(case: Case, own: OpTable, seconds: float, clock: Callable[[], float], threads: int) -> tuple[float, float]:
    """Median seconds of the own and of the plain body, which take turns for about `seconds`."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn, table in enumerate((own, PLAIN)):
        case.call(table, turn)
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        if turn >= 3 and time.perf_counter() > end:
            break
        for place, (table, taken) in enumerate(zip((own, PLAIN), times, strict=True)):
            start = clock()
            case.call(table, 2 * turn + place)  # what the other one just read is in the cache
            taken.append((clock() - start) / threads)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the C++ kernels against the plain torch bodies.")
    parser.add_argument("--op", choices=CASES, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="tokens or requests per call")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="per case")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    own = cpu_table()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    threads = 1 if arguments.clock == "wall" else arguments.threads
    print(f"torch {torch.__version__}, kernels {build.describe()}")
    print(f"{arguments.dtype}, {arguments.threads} threads, median {arguments.clock} time")
    print(f"{'op':23} {'shape':46} {'own us':>9} {'torch us':>9} {'ratio':>6} {'GB/s':>6} {'GFLOP/s':>8}")
    for op in arguments.op or CASES:
        for case in CASES[op](DTYPES[arguments.dtype], arguments.rows):
            ours, theirs = measure(case, own, arguments.seconds, clock, threads)
            print(
                f"{case.op:23} {case.shape:46} {ours * 1e6:9.1f} {theirs * 1e6:9.1f} {theirs / ours:6.2f} "
                f"{case.num_bytes / ours / 1e9:6.1f} {case.num_flop / ours / 1e9:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
