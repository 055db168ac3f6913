"""Whatever survives a restart, and nothing else: `snapshot` takes it, `load` puts it back.

    model.*  ema.*  optimizer.<parameter>.<state>  sums.window  data.* (normalisation)  tensors
    step, evaluated, best, schedule, scaler, guard, early stopping, sums, data, clock   plain values

Randomness is not in it: that is a function of seed and step.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.errors import CheckpointError, NumericalError
from trainer.storage.checkpoint import Snapshot

if TYPE_CHECKING:
    from trainer.loop import Trainer


def snapshot(trainer: "Trainer") -> Snapshot:
    """All that a resumed run needs, copied to the host: training may go on while it is written.

    Raises NumericalError, before anything is written, where a tensor holds NaN or an infinity.
    """
    own_tensors, plain = optimizer_tensors(trainer.model, trainer.optimizer)
    parts: dict[str, Mapping[str, Tensor]] = {
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.average.state_dict() if trainer.ema else {},
        "optimizer": own_tensors,
        "sums": {"window": trainer.sums.window},
        "data": trainer.normalisation.tensors,
    }
    tensors = {
        f"{part}.{name}": tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for part, state in parts.items()
        for name, tensor in state.items()
    }
    constants = {f"{part}.{name}" for name in trainer.constants for part in ("model", "ema")}
    checked = {name: tensor for name, tensor in tensors.items() if name not in constants}
    refuse_not_finite(checked, step=f"step {trainer.step} (epoch {trainer.epoch})")
    values = {
        "step": trainer.step,
        "evaluated": trainer.evaluated,
        "best": trainer.best,
        "optimizer": plain,
        "schedule": trainer.schedule.state(),
        "scaler": trainer.scaler.state_dict(),
        "guard": trainer.guard.state(),
        "early_stopping": trainer.early_stopping.state(),
        "sums": {"total": trainer.sums.total},
        "data": dict(trainer.data_values),
        "clock": {
            "seconds": trainer.clock.seconds,
            "training": trainer.clock.training,
            "samples": trainer.clock.samples,
        },
    }
    return Snapshot(tensors, values)


def load(trainer: "Trainer", snapshot: Snapshot) -> None:
    """Go on from a snapshot: the inverse of `snapshot`."""
    snapshot = migrated(snapshot)
    values = snapshot.values
    if values["data"]["fingerprint"] != trainer.data_values["fingerprint"]:
        raise CheckpointError("data", changed_data(values["data"], trainer.data_values))
    kept = snapshot.part("data")
    for name, tensor in trainer.normalisation.tensors.items():
        # Eigenvectors depend on the machine and its threads in their last bits, or more where eigenvalues are equal:
        # what was fitted first is gone on with. Mean and standard deviation have the same bits everywhere.
        if name != "whitening" and not torch.equal(tensor, kept[name]):
            raise CheckpointError("data", f"its {name} differs from that of the data this run was trained on")
    trainer.normalisation.load(kept)
    try:
        trainer.model.load_state_dict(snapshot.part("model"))
        if trainer.ema:
            trainer.ema.average.load_state_dict(snapshot.part("ema"))
    except RuntimeError as exception:
        raise CheckpointError("model", f"is not the one that this run trained: {exception}") from None
    load_optimizer_tensors(trainer.model, trainer.optimizer, snapshot.part("optimizer"), values["optimizer"])
    trainer.schedule.load_state(values["schedule"])
    if trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(values["scaler"])
    trainer.early_stopping.load_state(values["early_stopping"])
    trainer.sums.window = snapshot.tensors["sums.window"]
    trainer.sums.total = tuple(values["sums"]["total"])
    trainer.guard.load_state(values["guard"])
    trainer.step, trainer.evaluated, trainer.best = snapshot.step, values["evaluated"], values["best"]
    clock = values["clock"]
    trainer.clock.resume(seconds=clock["seconds"], training=clock["training"], samples=clock["samples"])


def migrated(snapshot: Snapshot) -> Snapshot:
    """A snapshot of an older format as one of this.

    1 -> 2  the window's count of samples stands behind its sums; no evaluation was ever put off; no step was skipped.
    """
    if snapshot.values["format"] > 1:
        return snapshot
    sums = snapshot.values["sums"]
    window = torch.cat([snapshot.tensors["sums.window"], torch.tensor([sums["window_count"]], dtype=torch.float64)])
    new = {"format": 2, "evaluated": snapshot.step, "guard": {"in_a_row": 0}, "sums": {"total": sums["total"]}}
    return Snapshot({**snapshot.tensors, "sums.window": window}, {**snapshot.values, **new})


def refuse_not_finite(tensors: Mapping[str, Tensor], *, step: str) -> None:
    """What is not finite is never saved: an update may overflow though loss and gradient were finite."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):  # the sum first: it reads memory once
            continue
        if not torch.isfinite(tensor).all():
            raise NumericalError(step, f"{name} is not finite and is not saved; try a lower optimizer.lr")


def changed_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is not as it was in data of another fingerprint, and what can be done."""
    old, new = before.get("counts", {}), now["counts"]  # older runs have none
    parts = [part for part in ("train", "val", "test") if old and old.get(part) != new.get(part)]
    counts = ", ".join(f"{part} {old.get(part, 'none')} -> {new.get(part, 'none')} pictures" for part in parts)
    what = counts or ("the same number of pictures" if old else "pictures added, removed") + ", other names or labels"
    return (
        f"is not the data that this run was trained on (fingerprint): {what}; put it back,"
        " or start a new run from these weights with init_from=RUN"
    )


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """An optimizer's state by parameter name: tensors as `<parameter>.<state>`, plain values apart."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value
            elif value is None or isinstance(value, bool | int | float | str):
                plain.setdefault(name, {})[key] = value
            else:
                raise CheckpointError(
                    f"optimizer {type(optimizer).__name__}", f"its state {key} is neither a tensor nor a plain value"
                )
    return tensors, plain


def load_optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Mapping[str, Any]],
) -> None:
    """Put back what `optimizer_tensors` took out, each tensor where and laid out as its parameter is."""
    for name, parameter in model.named_parameters():
        state: dict[str, Any] = dict(plain.get(name, {}))
        for full_name, tensor in tensors.items():
            owner, _, key = full_name.rpartition(".")
            if owner != name:
                continue
            if tensor.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            else:  # Adam's count of steps stays on the host, unless the optimizer is fused or capturable
                on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
                on_host = tensor.ndim == 0 and key in ("step", "mu_product") and not on_device
                state[key] = tensor.clone() if on_host else tensor.to(parameter.device, copy=True)
        if state:
            optimizer.state[parameter] = state
