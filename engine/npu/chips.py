"""What an NPU could do at best, by name: rates for `floor_seconds`, with where each number is from. None was measured.

A device of torch-npu is one die; an Ascend 910C has two.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..floor import MachineRates


@dataclass(frozen=True)
class Chip:
    """Published peaks of one die."""

    bytes_per_second: float
    flops_per_second: float  # dense, of bfloat16 and float16
    source: str


CHIPS = {
    "910B": Chip(
        1.2e12,
        320e12,
        "press reports, there is no data sheet: 1.2 TB/s (awesomeagents.ai, Huawei Ascend 910C), 320 TFLOPS of float16 "
        "(boardor.com, Huawei Ascend 910B outperforms H20)",
    ),
    "910C": Chip(1.6e12, 376e12, "one die of two: 3.2 TB/s and 752 TFLOPS per package (arXiv:2506.12708, section 3)"),
}


def chip_rates(name: str) -> MachineRates:
    """The rates of a chip in CHIPS."""
    chip = CHIPS[name]
    return MachineRates(chip.bytes_per_second, chip.flops_per_second, "bfloat16", f"Ascend {name}", 0)
