"""No NaN or infinity reaches the weights: loss and gradient are checked before the update.

A check waits for the device, which costs nothing on a CPU. On CUDA a flag on the device makes a fused update leave the
weights alone; the host reads the flags only when it waits anyway: at a log line, an evaluation, a checkpoint.

    trainer.on_nonfinite    stop: the run ends, and nothing after the previous step is saved
                            skip: the step is counted, but changes neither weights nor statistics nor sums
    with loss scaling       an overflowing gradient (not the loss) is skipped by the scaler, which then scales less

32 skipped steps in a row end the run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from core.errors import NumericalError
from trainer.durations import step_name

MOST_IN_A_ROW = 32


class NonFiniteGuard:
    """Decides about each update.

    `restored` are the tensors that a forward pass changes: the running statistics of batch norm. `take_back` gets the
    number of batches of a step, and a flag that is true if they do not count.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scaler: torch.amp.GradScaler,
        device: torch.device,
        skips: bool,
        steps_per_epoch: int,
        restored: Sequence[Tensor],
        take_back: Callable[[int, Tensor], None],
    ) -> None:
        self.optimizer, self.scaler, self.skips = optimizer, scaler, skips
        self.steps_per_epoch = steps_per_epoch
        obeys_flag = bool(optimizer.defaults.get("fused")) and getattr(optimizer, "_step_supports_amp_scaling", False)
        self.on_device = device.type == "cuda" and obeys_flag
        self.restored = restored if skips else ()
        self.take_back = take_back
        self.before = [torch.empty_like(tensor) for tensor in self.restored]
        self.in_a_row = torch.zeros((), device=device)  # steps that were not made, up to the last one
        self.longest = torch.zeros((), device=device)  # of these, since the host last asked
        # Whether the last step changed the weights: a flag on the device if only the device knows.
        self.updated: bool | Tensor = True
        # Steps since the host last asked: their number, whether they were skipped, and their samples.
        self.recent: list[tuple[int, Tensor, Sequence[Tensor]]] = []

    def remember(self) -> None:
        """Copy, before a step, what a skipped step must restore."""
        for copy, tensor in zip(self.before, self.restored, strict=True):
            copy.copy_(tensor)

    def allows(self, loss: Tensor, norm: Tensor, indices: Sequence[Tensor], *, step: int) -> bool:
        """May the update that makes `step` be made, of the samples `indices`? `norm` is that of the gradient.

        On the device the answer is always yes: there the update itself obeys the flag.
        """
        if self.on_device:
            not_finite = ~torch.isfinite(norm + loss)
            wrong = ~torch.isfinite(loss) if self.scaler.is_enabled() else not_finite
            if not self.scaler.is_enabled():
                self.optimizer.found_inf = wrong.float()  # type: ignore[attr-defined]  # fused updates obey it
            for copy, tensor in zip(self.before, self.restored, strict=True):
                tensor.copy_(torch.where(wrong, copy, tensor))
            if self.skips:
                self.take_back(len(indices), wrong)
            if self.skips or self.scaler.is_enabled():  # else the run ends, and nothing after that step is saved
                self.updated = ~not_finite
            self.recent.append((step, wrong, indices))
            self._count(not_finite)
            return True
        if math.isfinite(loss.item()) and (self.scaler.is_enabled() or math.isfinite(norm.item())):
            self.updated = True
            if self.scaler.is_enabled():
                overflows = ~torch.isfinite(norm)
                self.updated = not overflows.item()
                self._count(overflows)
                self._refuse_many(step=step)
            elif self.skips:
                self.in_a_row.zero_()
            return True
        what = f"loss {loss.item():g}, gradient norm {norm.item():g}, lr {self.optimizer.param_groups[0]['lr']:g}"
        if not self.skips:
            raise stopped(step_name(step, self.steps_per_epoch), f"{what}; {samples(indices)}")
        self.updated = False
        for copy, tensor in zip(self.before, self.restored, strict=True):
            tensor.copy_(copy)
        wrong = torch.ones((), dtype=torch.bool, device=loss.device)
        self.take_back(len(indices), wrong)
        self.recent.append((step, wrong, indices))
        self._count(wrong)
        self._refuse_many(step=step)
        return False

    def skipped(self, *, step: int) -> list[str]:
        """What was skipped since the last call, a line a step, for the log; where no step may be, the run ends."""
        flags = torch.stack([wrong for _, wrong, _ in self.recent]).tolist() if self.recent else []  # waits for it
        found = [
            (step_name(number, self.steps_per_epoch), indices)
            for wrong, (number, _, indices) in zip(flags, self.recent, strict=True)
            if wrong
        ]
        self.recent.clear()
        if found and not self.skips:
            name, indices = found[0]
            more = f", and {len(found) - 1} of the steps behind it" if len(found) > 1 else ""
            raise stopped(
                name, f"loss or gradient{more}; {samples(indices)}. That step was skipped, not those behind it"
            )
        self._refuse_many(step=step)
        return [f"{name} was skipped: loss or gradient not finite; {samples(indices)}" for name, indices in found]

    def _count(self, wrong: Tensor) -> None:
        self.in_a_row.add_(1).mul_(wrong)
        torch.maximum(self.longest, self.in_a_row, out=self.longest)

    def _refuse_many(self, *, step: int) -> None:
        longest = int(self.longest.item())
        self.longest.zero_()
        if longest >= MOST_IN_A_ROW:
            raise stopped(step_name(step, self.steps_per_epoch), f"{longest} steps in a row")

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"in_a_row": int(self.in_a_row.item())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.in_a_row.fill_(state["in_a_row"])


def samples(indices: Sequence[Tensor]) -> str:
    """The positions of a step's samples in the training part, the first few of them."""
    found = torch.cat(list(indices)).tolist()
    return "training samples " + ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")


def stopped(step: str, details: str) -> NumericalError:
    """The error for a step that is not finite."""
    advice = "try a lower optimizer.lr, trainer.clip_norm or trainer.on_nonfinite=skip"
    return NumericalError(step, f"not finite: {details}. Nothing of it is saved; {advice}")
