"""Muon, the optimizer of the demo models' matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is brought near an orthogonal matrix by Newton-Schulz steps (Keller Jordan, 2024); for
    matrices, and for stacks of them, the experts."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(gradient, 0.05)
                update = orthogonal(gradient.lerp(momentum, 0.95))
                rows, columns = parameter.shape[-2:]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """[…, rows, columns] -> the same singular vectors with singular values near 1."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    value = matrix if wide else matrix.mT
    value = value / (value.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = value @ value.mT
        value = 3.4445 * value + (-4.7750 * square + 2.0315 * square @ square) @ value
    return value if wide else value.mT
