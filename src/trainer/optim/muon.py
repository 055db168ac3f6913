"""Muon for the matrices inside a model, AdamW for all other parameters: two update rules in one optimizer.

    m <- momentum m + (1 - momentum) g          g: gradient, as a matrix (out, in x k x k) where it is a convolution's
    u <- (1 - momentum) g + momentum m          Nesterov momentum
    o <- u with all its singular values near 1, by `ns_steps` Newton-Schulz iterations
    w <- w - lr weight_decay w - lr s o         s = 0.2 sqrt(max(rows, columns)), or sqrt(max(1, rows / columns))

A gradient of low rank changes a matrix along few directions. The orthogonalised update changes it equally along all of
them. That suits matrices between activations. AdamW updates all other parameters (Jordan's advice): biases and
normalisation layers, which are vectors; the first convolution, which sees pixels; and layers that return logits. It
also updates the weights of grouped convolutions, each of which is several small matrices.

The first s makes updates about as large as those of AdamW, so that one learning rate suits both (Liu et al. 2025,
section 2.2). The second is Jordan's, and needs a smaller `adamw_lr`.

Differences to `torch.optim.Muon`: it accepts all parameters, uses float32 on a CPU, orthogonalises matrices of one
shape together, and obeys flags of the gradient scaler and the non-finite guard.

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
    """Optimizer whose parameter group with the name `muon` holds the matrices; all other groups are AdamW's."""

    _step_supports_amp_scaling = True  # a flag `found_inf` on the device makes `step` change nothing

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
        super().__init__(own, {"weight_decay": weight_decay, "fused": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless the flag `found_inf` on the device is 1.0."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["name"] == "muon":
                for matrices in of_one_shape(parameters):
                    self._update_matrices(matrices, group)
            elif parameters:
                self._update_others(parameters, group)

    def _update_matrices(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Update n weights, each a matrix (rows, columns) or filters (out, in, k, k) with rows = out."""
        lr, momentum, skipped = group["lr"], group["momentum"], getattr(self, "found_inf", None)
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        gradient = torch.stack([gradient.flatten(1) for gradient in gradients_of(weights)])  # (n, rows, columns)
        velocity = torch.stack([buffer.flatten(1) for buffer in buffers])
        if skipped is not None:  # a gradient equal to the momentum leaves the momentum unchanged
            gradient = torch.where(skipped.bool(), velocity, gradient)
        velocity.lerp_(gradient, 1 - momentum)
        torch._foreach_copy_(buffers, as_weights(velocity, weights))
        direction = gradient.lerp_(velocity, momentum) if group["nesterov"] else velocity
        update = orthogonalise(direction, steps=group["ns_steps"], dtype=working_type(weights[0].device)).float()
        rows, columns = update.shape[1:]
        scale = 0.2 * max(rows, columns) ** 0.5
        if group["adjust_lr_fn"] == "original":
            scale = max(1, rows / columns) ** 0.5
        decay = lr * group["weight_decay"]
        if skipped is None:
            torch._foreach_mul_(weights, 1 - decay)
        else:
            torch._foreach_mul_(weights, 1 - decay * (1 - skipped))
            update = update * (1 - skipped)
        torch._foreach_add_(weights, as_weights(update, weights), alpha=-lr * scale)

    def _update_others(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            gradients_of(parameters),
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],  # AMSGrad's
            state_steps=[state["step"] for state in states],
            fused=True,
            found_inf=getattr(self, "found_inf", None),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            amsgrad=False,
            maximize=False,
        )


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def of_one_shape(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the weights, grouped by their shape as matrices."""
    shapes = [(len(weight), weight[0].numel()) for weight in weights]
    return [
        [weight for weight, shape in zip(weights, shapes, strict=True) if shape == wanted]
        for wanted in dict.fromkeys(shapes)
    ]


def as_weights(matrices: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return matrices (n, rows, columns) as n tensors with the shapes of the weights."""
    return [matrix.view(weight.shape) for matrix, weight in zip(matrices.unbind(), weights, strict=True)]


def working_type(device: torch.device) -> torch.dtype:
    """Return the dtype of the iteration: bfloat16 is precise enough, but 30 times slower than float32 on most CPUs."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def orthogonalise(matrices: Tensor, *, steps: int, dtype: torch.dtype) -> Tensor:
    """Return matrices (n, rows, columns) with the same singular vectors, and singular values of about 0.7 to 1.2.

    Each step maps each singular value s to a s + b s^3 + c s^5, by X <- a X + (b X X' + c (X X')^2) X.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steep at 0, so five steps are enough; it does not converge to 1 (Jordan 2024)
    rows, columns = matrices.shape[1:]
    x = matrices.to(dtype) if rows <= columns else matrices.to(dtype).mT  # the smaller side makes the smaller product
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if rows <= columns else x.mT.contiguous()
