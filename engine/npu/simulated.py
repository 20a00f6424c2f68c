"""The simulated NPU, loaded in time: before torch, whose import torch-npu breaks on a machine without CANN."""

from __future__ import annotations

from ...ops.npu.simulator import build


def load_simulated_npu() -> None:
    """Stands in for CANN in this process, built where no earlier run left it. Raises ValueError with what to install;
    nothing of torch may have been imported where torch-npu is installed."""
    try:
        build.load()
    except build.SimulatorUnavailable as error:
        raise ValueError(
            "the simulated NPU needs torch-npu, gcc and nm; install gcc and binutils, and in an environment of its own "
            f"omni-engine[npu]: {error}"
        ) from error
