"""The state of a training: one object with everything that a checkpoint saves.

    model.*  ema.*                            tensors of each named model
    optimizer.<model>.<parameter>.<state>     tensors of each named optimizer
    data.*                                    tensors of the normalisation
    step, evaluated, best, config, data, ...  plain values, one entry for each component

Random values are not part of it: they are functions of the seed and the step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from core.errors import CheckpointError, NumericalError
from trainer.device import copied_to_host
from trainer.durations import epochs_at
from trainer.interfaces import Normalisation, Stateful
from trainer.monitor.clock import Clock
from trainer.monitor.early_stopping import EarlyStopping
from trainer.monitor.metrics import RunningSums, improves
from trainer.monitor.nonfinite import NonFiniteGuard
from trainer.optim.ema import ExponentialMovingAverage
from trainer.optim.lookahead import Lookahead
from trainer.optim.scheduling import Schedule
from trainer.snapshot import Snapshot


class TrainState:
    """Models, optimizers, progress and the components with state.

    `models` and `optimizers` are named, so that a training may have several of each. The model named "model" is the one
    that is trained, "ema" is its moving average, and "lookahead" has its slow weights.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        schedule: Schedule,
        scaler: torch.amp.GradScaler,
        guard: NonFiniteGuard,
        sums: RunningSums,
        early_stopping: EarlyStopping,
        ema: ExponentialMovingAverage | None,
        lookahead: Lookahead | None = None,
        normalisation: Normalisation,
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        steps_per_epoch: int,
    ) -> None:
        averages: dict[str, nn.Module] = {"ema": ema.average} if ema else {}
        self.models = {**models, **averages, **({"lookahead": lookahead.slow} if lookahead else {})}
        self.optimizers = dict(optimizers)
        self.schedule, self.scaler, self.guard, self.sums = schedule, scaler, guard, sums
        self.early_stopping, self.ema, self.lookahead = early_stopping, ema, lookahead
        self.clock = Clock()
        self.normalisation = normalisation  # the one that all loaders use
        self.config = config  # for checkpoints; a resumed run compares its config.yaml with it
        self.data = data  # class names, fingerprint and counts of the data, for checkpoints
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self.evaluated = 0  # the step of the last evaluation
        self.best: dict[str, Any] = {}  # step, epoch and metrics of the best evaluation
        self.settled = True  # whether a checkpoint may save this state; false within a step or an evaluation
        # Masks contain infinities on purpose: such buffers are not checked before a save.
        self._unchecked = {
            f"{part}.{name}"
            for part, model in self.models.items()
            for name, buffer in model.named_buffers()
            if not torch.isfinite(buffer).all()
        }

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.models["model"]

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the model."""
        return self.optimizers["optimizer"]

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated: the moving average if there is one."""
        return self.models.get("ema", self.model)

    @property
    def epoch(self) -> float:
        """The number of epochs done: 3 after the third, 2.5 in the middle of the third."""
        return epochs_at(self.step, self.steps_per_epoch)

    # Changes

    def unsettle(self) -> None:
        """Start a change: until `settle`, no checkpoint may save the state."""
        self.settled = False

    def settle(self) -> None:
        """End a change: a checkpoint may save the state."""
        self.settled = True

    def advance(self, samples: int) -> None:
        """Count a step."""
        self.step += 1
        self.clock.count(samples)

    def note_evaluation(self, metrics: dict[str, float], *, monitor: str | None, mode: str) -> bool:
        """Record an evaluation at this step, and return whether it is the best so far."""
        self.evaluated = self.step
        improved = monitor is not None and improves(
            metrics[monitor], self.best.get("metrics", {}).get(monitor), mode=mode
        )
        if improved:
            self.best = {"step": self.step, "epoch": self.epoch, "metrics": metrics}
        return improved

    # Saving and loading

    @property
    def _components(self) -> dict[str, Stateful]:
        """The components with plain values, by their names in a checkpoint."""
        return {
            "schedule": self.schedule,
            "scaler": self.scaler,
            "guard": self.guard,
            "early_stopping": self.early_stopping,
            "sums": self.sums,
            "clock": self.clock,
        }

    def state_dict(self) -> Snapshot:
        """Return everything that a resumed run needs, copied to the CPU: training can continue while it is written.

        Raises NumericalError, before anything is written, if a tensor holds NaN or an infinity.
        """
        parts: dict[str, Mapping[str, Tensor]] = {name: model.state_dict() for name, model in self.models.items()}
        plain = {}
        for name, optimizer in self.optimizers.items():
            parts[name], plain[name] = optimizer_state(self.models, optimizer)
        parts["data"] = self.normalisation.tensors
        named = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
        tensors = copied_to_host(named)
        checked = {name: tensor for name, tensor in tensors.items() if name not in self._unchecked}
        refuse_nonfinite(checked, step=f"step {self.step} (epoch {self.epoch})")
        values = {
            "step": self.step,
            "evaluated": self.evaluated,
            "best": self.best,
            "config": dict(self.config),
            "data": dict(self.data),
            "optimizers": plain,
            "steps_per_epoch": self.steps_per_epoch,
            **{name: component.state_dict() for name, component in self._components.items()},
        }
        return Snapshot(tensors, values)

    def load_state_dict(self, snapshot: Snapshot) -> None:
        """Continue from `state_dict()`.

        Raises CheckpointError if the snapshot is of other data or another model.
        """
        require_values(snapshot)
        values = snapshot.values
        if values["data"]["fingerprint"] != self.data["fingerprint"]:
            raise CheckpointError("data", changed_data(values["data"], self.data))
        if values["steps_per_epoch"] != self.steps_per_epoch:
            explanation = f"an epoch would have {self.steps_per_epoch} steps, not {values['steps_per_epoch']} as before"
            raise CheckpointError("data.batch_size", f"{explanation} (data.drop_last); choose another size")
        saved = snapshot.part("data")
        if any(not torch.equal(tensor, saved[name]) for name, tensor in self.normalisation.tensors.items()):
            raise CheckpointError("data", "its normalisation is not the one that this state was built with")
        try:
            for name, model in self.models.items():
                load_weights(model, snapshot.part(name))
        except RuntimeError as exception:
            raise CheckpointError("model", f"is not the one that this run trained: {exception}") from None
        for name, optimizer in self.optimizers.items():
            load_optimizer_state(self.models, optimizer, snapshot.part(name), values["optimizers"][name])
        try:
            for name, component in self._components.items():
                component.load_state_dict(values[name])
            self.step, self.evaluated, self.best = snapshot.step, int(values["evaluated"]), dict(values["best"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as exception:
            raise CheckpointError("checkpoint", f"its values are not those of a run: {exception!r}") from None


VALUES = {  # of a snapshot, besides those of the components
    "evaluated": int,
    "best": dict,
    "config": dict,
    "data": dict,
    "optimizers": dict,
    "steps_per_epoch": int,
}


def require_values(snapshot: Snapshot) -> None:
    """Raise CheckpointError if a plain value of a snapshot is missing or of another type, even if the hash matches."""
    for name, kind in VALUES.items():
        if not isinstance(snapshot.values.get(name), kind):
            raise CheckpointError("checkpoint", f"has no value {name!r}, or one of another kind")
    if not {"class_names", "fingerprint", "counts"} <= snapshot.values["data"].keys():
        raise CheckpointError("checkpoint", "does not say what its data was")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a state dict. Raises RuntimeError unless its names, shapes and dtypes are those of the model."""
    for name, own in model.state_dict().items():
        if name in weights and weights[name].dtype != own.dtype:
            raise RuntimeError(f"{name} has dtype {weights[name].dtype}, not {own.dtype}")
    model.load_state_dict(weights)


def refuse_nonfinite(tensors: Mapping[str, Tensor], *, step: str) -> None:
    """Raise NumericalError for a tensor with NaN or infinity: an update can overflow with a finite gradient."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):  # the sum first: it reads memory once
            continue
        if not torch.isfinite(tensor).all():
            raise NumericalError(step, f"{name} is not finite and is not saved; try a lower optimizer.lr")


def changed_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return how data with another fingerprint differs, and what to do."""
    old, new = before["counts"], now["counts"]
    splits = [split for split in ("train", "val", "test") if old.get(split) != new.get(split)]
    counts = ", ".join(f"{split} {old.get(split, 'none')} -> {new.get(split, 'none')} images" for split in splits)
    what = counts or "the same number of images, other names or labels"
    return (
        f"is not the data that this run was trained on (fingerprint): {what}; put it back,"
        " or start a new run from these weights with init_from=RUN"
    )


def _fits(tensor: Tensor, parameter: Tensor) -> bool:
    """Return whether a tensor can be an optimizer's state of a parameter: real values, one per weight, row or step."""
    sides = zip(tensor.shape, parameter.shape, strict=False)
    is_part = tensor.ndim != parameter.ndim or all(side in (1, full) for side, full in sides)
    return is_part and not tensor.is_complex() and (tensor.is_floating_point() or tensor.ndim == 0)


def _named_parameters(models: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {
        f"{part}.{name}": parameter for part, model in models.items() for name, parameter in model.named_parameters()
    }


def optimizer_state(
    models: Mapping[str, nn.Module], optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the state of an optimizer: tensors by `<model>.<parameter>.<state>`, plain values by parameter."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for name, parameter in _named_parameters(models).items():
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


def load_optimizer_state(
    models: Mapping[str, nn.Module],
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Mapping[str, Any]],
) -> None:
    """Restore what `optimizer_state` returned, each tensor on the device and in the layout of its parameter."""
    parameters = _named_parameters(models)
    states: dict[str, dict[str, Any]] = {name: dict(values) for name, values in plain.items()}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name not in parameters:
            raise CheckpointError("optimizer", f"its checkpoint has a state of {name}, which is no parameter")
        parameter = parameters[name]
        if not _fits(tensor, parameter):
            explanation = f"{full_name} has shape {list(tensor.shape)} and dtype {tensor.dtype}"
            raise CheckpointError("optimizer", f"{explanation}, which do not fit {list(parameter.shape)}")
        if tensor.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        else:  # Adam's count of steps stays on the host, unless the optimizer is fused or capturable
            on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
            on_host = tensor.ndim == 0 and key in ("step", "mu_product") and not on_device
            value = tensor.clone() if on_host else tensor.to(parameter.device, copy=True)
        states.setdefault(name, {})[key] = value
    for name, state in states.items():
        optimizer.state[parameters[name]] = state
