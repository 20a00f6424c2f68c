"""Loads torch-npu and TorchAir once, and keeps the constants that operators want on their device."""

from __future__ import annotations

import torch
from torch import Tensor

# Operators take a causal mask of this size whatever the lengths are, and align it to the ends themselves.
MASK_SIZE = 2048

_causal_masks: dict[torch.device, Tensor] = {}


def is_available() -> bool:
    """Whether torch finds an NPU by itself, which it does where torch-npu is installed and its autoload is on."""
    return hasattr(torch, "npu") and torch.get_device_module("npu").is_available()


def import_torch_npu() -> None:
    """Imports torch-npu, so that `torch.ops.npu` is filled, and settles how it runs operators. Raises ImportError
    where torch-npu or what it is linked to is missing."""
    try:
        import torch_npu  # pyright: ignore[reportMissingImports]
        import torchair  # pyright: ignore[reportMissingImports]
        import torchair.ops._npu_fused_infer_attention_score_v2  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "the NPU backend needs torch-npu in the version of torch, and the CANN toolkit in LD_LIBRARY_PATH "
            f"(pip install omni-engine[npu], then source set_env.sh): {error}"
        ) from error
    from .converters import register

    register()
    # Ops go through aclnn and not through the older operator library, which a captured graph refuses; and weights may
    # be stored in tiles.
    torch_npu.npu.config.allow_internal_format = True
    torch_npu.npu.set_compile_mode(jit_compile=False)


def versions() -> dict[str, str]:
    """What a compiled graph depends on beside torch: torch_npu, cann and soc."""
    import torch_npu  # pyright: ignore[reportMissingImports]

    return {
        "torch_npu": str(torch_npu.__version__),
        "cann": str(torch_npu.npu.utils.get_cann_version()),
        "soc": str(torch_npu.npu.get_device_name()),
    }


def load(device: torch.device) -> None:
    """`import_torch_npu`, and puts constants on `device`. Call it before anything is traced."""
    import_torch_npu()
    if device not in _causal_masks:
        _causal_masks[device] = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device).triu(1)


def causal_mask(device: torch.device) -> Tensor:
    """bool [2048, 2048], true above the diagonal, where nothing is seen: what sparse modes 2 to 4 want."""
    mask = _causal_masks.get(device)
    if mask is None:
        raise ValueError(f"the NPU library is not loaded for this device; call ops.npu.library.load first: {device}")
    return mask
