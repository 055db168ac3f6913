"""Nothing that is not finite reaches the weights: loss and gradient are looked at before the update.

Looking costs a wait for the device, which a CPU does not mind. On CUDA a fused update is told by a flag on the device
to leave the weights alone, and the host asks only where it waits anyway: at a log line, an evaluation, a checkpoint.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from core.errors import NumericalError


class FiniteGuard:
    """Raises NumericalError for a step whose loss or gradient is not finite; at the latest before anything is saved."""

    def __init__(self, optimizer: Optimizer, *, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.on_device = device.type == "cuda" and bool(optimizer.defaults.get("fused"))
        self.skipped = torch.zeros((), device=device)

    def check(self, loss: Tensor, norm: Tensor, indices: Iterable[Tensor], *, step: str) -> None:
        """Before the update that makes `step`, of the samples `indices`; `norm` is that of the gradient.

        With loss scaling (fp16) an overflowing gradient is the scaler's business, and only the loss is looked at.
        """
        watched = loss.detach() if self.scaler.is_enabled() else norm + loss.detach()
        if self.on_device:
            not_finite = (~torch.isfinite(watched)).float()
            self.skipped += not_finite
            if not self.scaler.is_enabled():
                self.optimizer.found_inf = not_finite  # type: ignore[attr-defined]  # fused updates obey it
        elif not math.isfinite(watched.item()):
            samples = torch.cat(list(indices)).tolist()
            shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
            rate = self.optimizer.param_groups[0]["lr"]
            raise diverged(
                step, f"loss {loss.item():g}, gradient norm {norm.item():g}, lr {rate:g}; training samples {shown}"
            )

    def refuse_skipped(self, *, step: str) -> None:
        """Steps that the device skipped end the run."""
        if count := int(self.skipped.item()):
            raise diverged(step, f"{count} of the steps since the last log line or evaluation")


def diverged(step: str, details: str) -> NumericalError:
    """The error for a step that is not finite."""
    advice = "The weights are those before it; try a lower optimizer.lr or trainer.clip_norm"
    return NumericalError(step, f"not finite: {details}. {advice}")
