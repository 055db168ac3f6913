"""Build the schedule of the learning rates from the section `schedule`."""

import inspect
from functools import partial

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from core.errors import ConfigError
from core.options.declarations import ScheduleOptions
from core.options.files import options_with
from trainer.build.instantiate import construct, resolve
from trainer.durations import warmup_steps
from trainer.monitor.metrics import resolve_mode
from trainer.optim.schedules import Factor, one_cycle_momentum
from trainer.optim.scheduling import FactorSchedule, Plateau, Schedule, TorchScheduler, momentum_of

NOT_ARGUMENTS = ("interval", "momentum", "warmup_epochs")  # keys that the trainer reads, for some schedules


def build_schedule(
    node: ScheduleOptions, optimizer: torch.optim.Optimizer, *, total: int, steps_per_epoch: int
) -> Schedule:
    """Return the schedule that sets the learning rate of each parameter group.

    Raises ConfigError for an argument that the schedule does not use, or that does not fit a run of `total` steps.
    """
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    own = {key: value for key, value in node.items() if key not in NOT_ARGUMENTS}
    target = resolve("schedule", node["_target_"])
    is_torch_scheduler = inspect.isclass(target) and issubclass(target, LRScheduler)
    used = {"warmup_epochs", "momentum"}
    if is_torch_scheduler:
        used = {"interval"}
    elif target is Plateau:
        used = {"warmup_epochs"}
    for key in NOT_ARGUMENTS:
        if key not in used and dict(node).get(key) is not None:
            explanation = f"is not used by this schedule, but by {options_with(f'schedule.{key}')}"
            raise ConfigError(f"schedule.{key}", explanation, value=dict(node)[key])
    if target is ReduceLROnPlateau:
        raise ConfigError(
            "schedule._target_",
            "must not be a scheduler that monitors a metric; use schedule=plateau",
            value=node["_target_"],
        )
    if is_torch_scheduler:
        try:
            scheduler = construct({**own, "_partial_": True}, "schedule")(optimizer)
        except (TypeError, ValueError) as exception:
            raise ConfigError("schedule", str(exception), value=node["_target_"]) from None
        adapter = TorchScheduler(scheduler, interval=node.get("interval", "epoch"), steps_per_epoch=steps_per_epoch)
        horizon, needed = getattr(scheduler, "total_steps", None), -(-total // adapter.every) - 1
        if isinstance(horizon, int) and needed > horizon:
            unit = "epochs" if adapter.every > 1 else "steps"
            explanation = f"is too short: this run steps it {needed:,} times; set it to the {unit} of the run"
            raise ConfigError("schedule.total_steps", explanation, value=horizon)
        return adapter
    warmup = warmup_steps(node.get("warmup_epochs", 0), steps_per_epoch=steps_per_epoch)
    if warmup >= total:
        raise ConfigError(
            "schedule.warmup_epochs",
            f"{warmup:,} steps of warm-up; must be fewer than the {total:,} steps of the run",
            value=node["warmup_epochs"],
        )
    if target is Plateau:
        own["mode"] = resolve_mode(node["mode"], node["monitor"])
        plateau: Schedule = construct(own, "schedule", base_lrs=base_lrs, warmup_steps=warmup)
        return plateau
    factor = construct({**own, "_partial_": True}, "schedule")
    momentum = _momentum_cycle(node, optimizer)
    try:
        factor(0, total, warmup)
    except ConfigError as error:
        raise error.under("schedule") from None
    except TypeError as exception:
        raise ConfigError("schedule", str(exception), value=node["_target_"]) from None
    return FactorSchedule(factor, base_lrs=base_lrs, total_steps=total, warmup_steps=warmup, momentum=momentum)


def _momentum_cycle(node: ScheduleOptions, optimizer: torch.optim.Optimizer) -> Factor | None:
    """Return the momentum as a function of the step (one-cycle), or None if `schedule.momentum` is null."""
    momentum = node.get("momentum")
    if momentum is None:
        return None
    if "rise" not in node:
        raise ConfigError("schedule.momentum", "also needs schedule.rise, as in schedule=one_cycle")
    if not any(momentum_of(group) for group in optimizer.param_groups):
        raise ConfigError(
            "schedule.momentum", "must be null: this optimizer has no momentum, or 0", value=node["momentum"]
        )
    low, high = momentum  # the schema checks its form
    if low > high:
        raise ConfigError("schedule.momentum", "must be [lowest, highest]", value=node["momentum"])
    return partial(one_cycle_momentum, low=low, high=high, rise=node["rise"])
