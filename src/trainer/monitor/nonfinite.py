"""Keep NaN and infinity out of the weights: loss and gradient norm are checked at each step.

    trainer.on_nonfinite    stop: the run ends, and nothing after the previous step is saved
                            skip: the step is counted, but changes neither weights nor statistics nor sums
    with loss scaling       an overflowing gradient (not the loss) is skipped by the scaler, which then scales less

Reading a value makes the CPU wait for the device. On a CPU that costs nothing, and the check precedes the update. On
CUDA the check is a flag on the device: a fused update obeys it, and the CPU reads the flags of many steps at once at a
log line, an evaluation or a checkpoint. An optimizer that is not fused cannot obey a flag. With `stop`, its run ends at
the next log line, and nothing of it is saved; with `skip`, the CPU waits at every step.

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
from trainer.monitor.restorable import RestorableTensors

MOST_IN_A_ROW = 32


class NonFiniteGuard:
    """Decides about each update.

    `buffers` are the tensors that a forward pass changes: the running statistics of batch norm. `discard` gets the
    number of batches of a step, and a flag (scalar, 0.0 or 1.0) that is 1.0 if they do not count.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scaler: torch.amp.GradScaler,
        device: torch.device,
        skips: bool,
        steps_per_epoch: int,
        buffers: Sequence[Tensor],
        discard: Callable[[int, Tensor], None],
    ) -> None:
        self.optimizer, self.scaler, self.skips = optimizer, scaler, skips
        self.steps_per_epoch = steps_per_epoch
        self.obeys_flag = bool(optimizer.defaults.get("fused")) and getattr(
            optimizer, "_step_supports_amp_scaling", False
        )
        self.on_device = device.type == "cuda" and (self.obeys_flag or not (skips or scaler.is_enabled()))
        self.buffers = RestorableTensors(buffers if skips else ())
        self.discard = discard
        self.in_a_row = 0  # skipped steps up to the last one that was read
        self.skipped: bool | Tensor = False  # was the last update skipped? A flag if only the device knows
        # Steps whose flags were not read yet: number, flag of the step, flag of its update, sample indices.
        self.unread: list[tuple[int, Tensor, Tensor, Sequence[Tensor]]] = []

    def remember(self) -> None:
        """Copy, before a step, what a skipped step must restore."""
        self.buffers.remember()

    def allows(self, loss: Tensor, norm: Tensor, indices: Sequence[Tensor], *, step: int) -> bool:
        """Return whether to make the update that leads to `step`, for the samples `indices`; `norm` is the gradient's.

        With flags on the device this is always true.
        """
        if self.on_device:
            self._flag(loss, norm, indices, step=step)
            return True
        if self.scaler.is_enabled():
            return self._allows_scaled(loss, norm, indices, step=step)
        if math.isfinite((loss + norm).item()):
            self.skipped, self.in_a_row = False, 0
            return True
        self._refuse(loss, norm, indices, step=step)
        return False

    def _flag(self, loss: Tensor, norm: Tensor, indices: Sequence[Tensor], *, step: int) -> None:
        """Set flags on the device, 1.0 for a loss or norm that is not finite: x - x is 0 or NaN; at most 4 kernels."""
        if self.scaler.is_enabled():
            losses = torch.stack([loss, loss + norm])
            is_wrong, is_not_updated = losses.sub_(losses).ne_(0)
        else:
            total = loss + norm
            is_wrong = is_not_updated = total.sub_(total).ne_(0)
            if self.obeys_flag:
                self.optimizer.found_inf = is_wrong  # type: ignore[attr-defined]
        self.buffers.restore(is_wrong)
        if self.skips:
            self.discard(len(indices), is_wrong)
        if self.skips or self.scaler.is_enabled():  # else the run ends, and nothing after that step is saved
            self.skipped = is_not_updated
        self.unread.append((step, is_wrong, is_not_updated, indices))

    def _allows_scaled(self, loss: Tensor, norm: Tensor, indices: Sequence[Tensor], *, step: int) -> bool:
        """Return what `allows` returns, with loss scaling: the scaler skips an update with an overflowing gradient."""
        is_finite, is_update_finite = torch.stack([loss, loss + norm]).isfinite().tolist()
        if not is_finite:
            self._refuse(loss, norm, indices, step=step)
            return False
        self.skipped = not is_update_finite
        self.in_a_row = 0 if is_update_finite else self.in_a_row + 1
        self._refuse_many(self.in_a_row, step=step)
        return True

    def _refuse(self, loss: Tensor, norm: Tensor, indices: Sequence[Tensor], *, step: int) -> None:
        """Skip a step before its update, or end the run."""
        if not self.skips:
            lr = self.optimizer.param_groups[0]["lr"]
            what = f"loss {loss.item():g}, gradient norm {norm.item():g}, lr {lr:g}"
            raise stopped(step_name(step, self.steps_per_epoch), f"{what}; {samples(indices)}")
        self.skipped = True
        flag = torch.ones((), device=loss.device)
        self.buffers.restore(flag)
        self.discard(len(indices), flag)
        self.unread.append((step, flag, flag, indices))
        self.in_a_row += 1
        self._refuse_many(self.in_a_row, step=step)

    def report(self) -> list[str]:
        """Return one line for each step skipped since the last call; waits for the device.

        Raises NumericalError if no step may be skipped, or after too many skipped steps in a row.
        """
        unread, self.unread = self.unread, []
        if not unread:
            return []
        flags = torch.stack([torch.stack([step[1] for step in unread]), torch.stack([step[2] for step in unread])])
        are_wrong, are_not_updated = flags.tolist()
        if self.on_device:
            self._count(are_not_updated, last_step=unread[-1][0])
        found = [
            (step_name(number, self.steps_per_epoch), indices)
            for is_wrong, (number, _, _, indices) in zip(are_wrong, unread, strict=True)
            if is_wrong
        ]
        if found and not self.skips:
            name, indices = found[0]
            more = f", and {len(found) - 1} later steps" if len(found) > 1 else ""
            raise stopped(
                name, f"loss or gradient{more}; {samples(indices)}. Later steps were computed before this check"
            )
        return [f"{name} was skipped: loss or gradient not finite; {samples(indices)}" for name, indices in found]

    def _count(self, are_skipped: Sequence[float], *, last_step: int) -> None:
        longest = 0
        for is_skipped in are_skipped:
            self.in_a_row = self.in_a_row + 1 if is_skipped else 0
            longest = max(longest, self.in_a_row)
        self._refuse_many(longest, step=last_step)

    def _refuse_many(self, longest: int, *, step: int) -> None:
        if longest >= MOST_IN_A_ROW:
            raise stopped(step_name(step, self.steps_per_epoch), f"{longest} steps in a row")

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint; `report` precedes it."""
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.in_a_row = int(state["in_a_row"])


def samples(indices: Sequence[Tensor]) -> str:
    """Return the positions of a step's samples in the train split, the first few of them, as text."""
    positions = torch.cat(list(indices)).tolist()
    return "training samples " + ", ".join(map(str, positions[:8])) + (", ..." if len(positions) > 8 else "")


def stopped(step: str, details: str) -> NumericalError:
    """Return the error for a step that is not finite."""
    advice = "try a lower optimizer.lr, trainer.clip_norm or trainer.on_nonfinite=skip"
    return NumericalError(step, f"not finite: {details}. Nothing of it is saved; {advice}")
