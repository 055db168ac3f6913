"""Muon for the matrices inside a network, AdamW for everything else: two update rules, one optimizer to the loop.

    m <- momentum m + (1 - momentum) g          g: gradient, as a matrix (out, in x k x k) where it is a convolution's
    u <- (1 - momentum) g + momentum m          Nesterov's look ahead
    o <- u with all its singular values near 1, by `ns_steps` steps of Newton and Schulz's iteration
    w <- w - lr weight_decay w - lr s o         s = 0.2 sqrt(max(rows, columns)), or sqrt(max(1, rows / columns))

A gradient of low rank moves a matrix in a few directions only; made orthogonal, it moves in all of them alike. That is
meant for matrices between activations. Biases and norms are vectors, the first convolution sees pixels, and the layers
that give logits stand at the other end: all these are AdamW's (Jordan's advice). So are the weights of grouped
convolutions, each of which is several small matrices.

The first s makes steps as large as AdamW's usually are, so that one learning rate does for both (Liu et al. 2025,
section 2.2); the second is Jordan's own, which wants a smaller `adamw_lr` beside it.

This is `torch.optim.Muon`, which takes matrices only and always works in 16 bits, and torch's own code for AdamW.

Source: Jordan et al. 2024, Muon: An Optimizer for Hidden Layers in Neural Networks (kellerjordan.github.io/posts/muon);
Liu et al. 2025, Muon is Scalable for LLM Training.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from core.errors import ConfigError


class Muon(Optimizer):
    """Its groups are dictionaries with a `name`; the one named `muon` holds the matrices, all others are AdamW's."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        adamw_lr: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if adjust_lr_fn not in ("match_rms_adamw", "original"):
            raise ConfigError("adjust_lr_fn", "must be match_rms_adamw or original", value=adjust_lr_fn)
        if type(ns_steps) is not int or not 1 <= ns_steps < 100:
            raise ConfigError("ns_steps", "must be an integer in [1, 99]", value=ns_steps)
        muons: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        muons |= {"ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        adamws = {"lr": lr if adamw_lr is None else adamw_lr, "betas": tuple(betas), "eps": eps}
        own = [{**(muons if group["name"] == "muon" else adamws), **group} for group in groups]
        super().__init__(own, {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in parameters]
            update = self._update_matrices if group["name"] == "muon" else self._update_others
            update(parameters, gradients, group)

    def _update_matrices(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        rate, momentum = group["lr"], group["momentum"]
        for weight, gradient in zip(weights, gradients, strict=True):
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            velocity = self.state[weight]["momentum_buffer"]
            velocity.lerp_(gradient, 1 - momentum)
            direction = gradient.lerp(velocity, momentum) if group["nesterov"] else velocity
            matrix = direction.flatten(1)  # (out, in, k, k) -> (out, in x k x k)
            rows, columns = matrix.shape
            scale = 0.2 * max(rows, columns) ** 0.5
            if group["adjust_lr_fn"] == "original":
                scale = max(1, rows / columns) ** 0.5
            update = orthogonalise(matrix, steps=group["ns_steps"], dtype=working_type(weight.device))
            weight.mul_(1 - rate * group["weight_decay"])
            weight.add_(update.reshape(weight.shape), alpha=-rate * scale)

    def _update_others(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            gradients,
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],  # AMSGrad's
            state_steps=[state["step"] for state in states],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            amsgrad=False,
            maximize=False,
        )


def working_type(device: torch.device) -> torch.dtype:
    """Of the iteration: 16 bits are enough for it, but few CPUs have them (without, 32 are 30 times as fast)."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def orthogonalise(matrix: Tensor, *, steps: int, dtype: torch.dtype) -> Tensor:
    """A matrix (rows, columns) with the same singular vectors, and singular values between 0.7 and 1.2 or so.

    s <- a s + b s^3 + c s^5        of each singular value s, as X <- a X + (b X X' + c (X X')^2) X does
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steep at 0, so that five steps do; it does not converge to 1 (Jordan 2024)
    rows, columns = matrix.shape
    x = matrix.to(dtype) if rows <= columns else matrix.to(dtype).T  # the smaller side makes the smaller product
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if rows <= columns else x.T
