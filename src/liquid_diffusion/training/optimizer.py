"""Muon for the convolutions that mix channels, AdamW for all else.

Shapes: N matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from liquid_diffusion.hardware import fastest_dtype
from liquid_diffusion.models.layers import ConditionLinear
from liquid_diffusion.models.unet import LiquidUNet

_BETAS = (0.9, 0.99)
_MOMENTUM = 0.95
# of the polynomial whose five-fold application brings singular values from (0, 1] to about 1; Jordan et al., "Muon: An
# optimizer for hidden layers in neural networks" (2024)
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# The root mean square of an AdamW update is 0.2 to 0.4 in practice: with it one learning rate serves both (Liu et al.,
# "Muon is scalable for LLM training", arXiv 2502.16982, equation 4).
_UPDATE_SIZE = 0.2
# Of the learning rate, for weights that read the condition. AdamW moves each weight by about the rate, whatever its
# gradient, and all inputs of a sample add up: the hundreds of numbers of an embedding move scale and shift a hundred
# times as far as a bias (the rule 1 / inputs for Adam's rate is that of Yang et al., arXiv 2203.03466).
_CONDITION_SHARE = 0.02


def orthogonalise(matrices: Tensor) -> Tensor:
    """The singular values of matrices (N, R, C) brought to about 1, between 0.7 and 1.2, by Newton and Schulz.

    ``X <- a X + (b A + c A A) X`` with ``A = X X^T``, five times, from ``X = G / |G|`` (Jordan et al., 2024).
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT  # A is then the smaller of the two products
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(fastest_dtype(x.device))
    for _ in range(_ITERATIONS):
        product = x @ x.mT  # (N, R, R)
        polynomial = torch.baddbmm(product, product, product, beta=b, alpha=c)  # (N, R, R)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def channel_mixers(model: LiquidUNet) -> Iterator[nn.Parameter]:
    """Weights of the convolutions inside a model that are not depthwise.

    Not of those that read places and picture, and write it, whose few channels are no hidden features.
    """
    outer = (model.stem, model.position.project, model.head)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module not in outer:
            assert isinstance(module.weight, nn.Parameter)
            yield module.weight


def condition_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of the layers that read the embedding of time and label; not their biases."""
    for module in model.modules():
        if isinstance(module, ConditionLinear):
            assert isinstance(module.weight, nn.Parameter)
            yield module.weight


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of a step, or the share of it that a group of weights has."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("share", 1.0)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024) for some weights, each as the matrix (out channels, all else), AdamW for the others.

    torch's own Muon takes matrices only, and leaves all that is none to another optimizer beside it, which the loss
    scaling of accelerate does not bear. This is one optimizer; on matrices it does what torch's does with
    `adjust_lr_fn="match_rms_adamw"`.

    Args:
        mixers: weights (out channels, ...) that are orthogonalised.
        slow: weights that AdamW trains at a fiftieth of the learning rate.
        others: all other parameters.
        lr: of mixers and others; see `set_learning_rate`.
        weight_decay: of all, decoupled.
    """

    def __init__(
        self,
        mixers: list[nn.Parameter],
        slow: list[nn.Parameter],
        others: list[nn.Parameter],
        lr: float,
        weight_decay: float,
    ) -> None:
        groups = [
            {"params": mixers, "orthogonal": True, "share": 1.0},
            {"params": slow, "orthogonal": False, "share": _CONDITION_SHARE},
            {"params": others, "orthogonal": False, "share": 1.0},
        ]
        super().__init__(groups, lr=lr, betas=_BETAS, weight_decay=weight_decay, fused=True)
        set_learning_rate(self, lr)
        # AdamW's fused kernel looks for itself whether the scaled gradients overflowed; what is not AdamW would not
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step; the gradients of the orthogonalised weights are gone afterwards."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if group["orthogonal"]:
                self._step_orthogonal(group)
        super().step()  # which passes over what has no gradient
        return loss

    def _step_orthogonal(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        for weight in weights:
            if not self.state[weight]:
                # the step is not needed here; AdamW looks for it in all that it loads
                self.state[weight] = {"step": torch.zeros(()), "momentum": torch.zeros_like(weight)}
        gradients = [weight.grad for weight in weights]
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        updates = torch._foreach_lerp(gradients, momenta, _MOMENTUM)  # Nesterov's
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for weight, update in zip(weights, updates, strict=True):
            matrix = update.flatten(1)
            by_shape[matrix.shape[0], matrix.shape[1]].append((weight, matrix))
            weight.grad = None
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for (rows, columns), chosen in by_shape.items():  # of one shape at once: few products, large ones
            matrices = orthogonalise(torch.stack([matrix for _, matrix in chosen]))
            shaped = [matrix.view(weight.shape) for (weight, _), matrix in zip(chosen, matrices, strict=True)]
            size = _UPDATE_SIZE * max(rows, columns) ** 0.5
            torch._foreach_add_([weight for weight, _ in chosen], shaped, alpha=-group["lr"] * size)


def optimizer_of(
    model: nn.Module, mixers: Iterable[nn.Parameter], slow: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """`Muon` for some weights of a model and AdamW for the others, or AdamW alone where there are none.

    Args:
        model: whose parameters are trained.
        mixers: those of them that are orthogonalised.
        slow: those that are trained slower beside them.
        lr: learning rate.
        weight_decay: decoupled, of all.
    """
    chosen, slower = list(mixers), list(slow)
    if not chosen:
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=_BETAS, weight_decay=weight_decay, fused=True)
    numbers = {id(weight) for weight in (*chosen, *slower)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in numbers]
    return Muon(chosen, slower, others, lr, weight_decay)
