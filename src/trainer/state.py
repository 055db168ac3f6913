"""Whatever survives a restart, and nothing else: `snapshot` takes it, `load` puts it back.

    model.*  ema.*  optimizer.<parameter>.<state>  sums.window  data.* (normalisation)  tensors
    step, best, schedule, scaler, early stopping, sums, data, clock                     plain values

Randomness is not in it: that is a function of seed and step.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.errors import CheckpointError
from trainer.checkpoint import Snapshot

if TYPE_CHECKING:
    from trainer.trainer import Trainer


def snapshot(trainer: "Trainer") -> Snapshot:
    """All that a resumed run needs. Randomness is none of it: that is a function of seed and step."""
    own_tensors, plain = optimizer_tensors(trainer.model, trainer.optimizer)
    parts: dict[str, Mapping[str, Tensor]] = {
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.average.state_dict() if trainer.ema else {},
        "optimizer": own_tensors,
        "sums": {"window": trainer.sums.window},
        "data": trainer.normalisation.tensors,
    }
    tensors = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    values = {
        "step": trainer.step,
        "best": trainer.best,
        "optimizer": plain,
        "schedule": trainer.schedule.state(),
        "scaler": trainer.scaler.state_dict(),
        "early_stopping": trainer.early_stopping.state(),
        "sums": {"window_count": trainer.sums.window_count, "total": trainer.sums.total},
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
    values = snapshot.values
    if values["data"]["fingerprint"] != trainer.data_values["fingerprint"]:
        raise CheckpointError("data", "differs from the data this run was trained on (fingerprint)")
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
    trainer.sums.window.copy_(snapshot.tensors["sums.window"])
    trainer.sums.window_count, trainer.sums.total = values["sums"]["window_count"], tuple(values["sums"]["total"])
    trainer.step, trainer.best = snapshot.step, values["best"]
    clock = values["clock"]
    trainer.clock.resume(seconds=clock["seconds"], training=clock["training"], samples=clock["samples"])


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
            else:  # Adam's step count: a scalar that stays on the host unless the optimizer is fused or capturable
                on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
                state[key] = tensor.to(parameter.device) if on_device else tensor.clone()
        if state:
            optimizer.state[parameter] = state
