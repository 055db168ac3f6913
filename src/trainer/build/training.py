"""From a config to the objects of a training.

Building is pure: it opens no run folder, installs no signal handler and prints nothing.

    config -> device -> augmentation -> data -> model -> loaders -> optimizer, schedule, loss -> state -> Training

Every mistake in a config is found here, before the first step, and reported by its key. A config that comes with a run
folder builds only classes that are trusted (`build.trust`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from core.config import Config
from core.errors import ConfigError
from core.options.declarations import EarlyStoppingOptions, LookaheadOptions, TrainConfig
from core.seeding import fold
from data.loading.loaders import TrainLoader
from data.sources.splits import Splits, largest_share
from trainer.build.checks import check_classes, check_monitors, warn_of_mirroring, with_classes
from trainer.build.data import build_augmentation, build_data, build_loaders
from trainer.build.dry_run import check_model, check_training, dummy_batches
from trainer.build.generators import seeded
from trainer.build.loss import build_loss
from trainer.build.model import build_model, place
from trainer.build.normalisation import saved_normalisation
from trainer.build.optimizer import build_optimizer
from trainer.build.schedule import build_schedule
from trainer.build.step import build_step
from trainer.build.trust import trusted_values
from trainer.build.weights import initialise
from trainer.device import autocast, choose_device
from trainer.durations import to_steps, total_steps
from trainer.interfaces import Normalisation
from trainer.monitor.early_stopping import EarlyStopping
from trainer.monitor.metrics import RunningSums
from trainer.monitor.nonfinite import NonFiniteGuard
from trainer.optim.ema import ExponentialMovingAverage
from trainer.optim.lookahead import Lookahead
from trainer.optim.parameter_groups import decayed_parameters, scale_biases, trainable_parameters_of
from trainer.settings import Settings
from trainer.snapshot import Snapshot
from trainer.state import TrainState
from trainer.training import Training


def build(config: Config[TrainConfig], *, saved: Snapshot | None = None) -> tuple[Training, Splits]:
    """Return the training that a config describes, at step 0, and its data.

    `saved` is the snapshot that a resumed run will load: its normalisation is used, and nothing is fitted or loaded
    that the snapshot replaces. Raises ConfigError, DataError or SecurityError.
    """
    values = trusted_values(config)
    device = choose_device(values["trainer"]["device"], values["trainer"]["precision"])
    with seeded(fold(values["seed"], "init"), device):  # a user's class may draw random values when it is constructed
        return _build(config, values, device, saved)


def _build(
    config: Config[TrainConfig], values: TrainConfig, device: torch.device, saved: Snapshot | None
) -> tuple[Training, Splits]:
    """Do what `build` does, within seeded generators."""
    settings, seed = values["trainer"], values["seed"]
    check_classes(values)
    augmentation = build_augmentation(values["augment"], values["data"])
    warn_of_mirroring(augmentation, values)

    known = saved_normalisation(saved, str(values["resume"]), kind=values["data"]["normalise"]) if saved else None
    splits = build_data(values["data"], seed=seed, normalisation=known)
    monitors = check_monitors(values, has_val=splits.val is not None)
    record = with_classes(config.record, splits.class_names)
    values = with_classes(values, splits.class_names)

    model = build_model(values, init_seed=fold(seed, "init"))
    check_model(model, values)
    weights_report = [] if saved else initialise(model, values, splits, shown=record["init_from"])
    channels_last = place(model, device, channels_last=settings["channels_last"])

    normalisation = splits.normalisation.to(device, channels_last=channels_last)
    train_loader, val_loader, test_loader = build_loaders(
        values, splits, augmentation, normalisation=normalisation, device=device
    )
    dummies = dummy_batches(values["data"], train_loader, device, channels_last=channels_last)
    check_training(model, values, dummies)
    loop_settings = build_settings(values, train_loader, monitor_mode=monitors.get("trainer.checkpoint", "min"))
    state = build_state(
        values,
        model,
        early_stopping=build_early_stopping(settings["early_stopping"], mode=monitors["trainer.early_stopping"]),
        normalisation=normalisation,
        config=record,
        data={"class_names": splits.class_names, "fingerprint": splits.fingerprint, "counts": splits.counts},
        device=device,
        total_steps=loop_settings.total_steps,
        steps_per_epoch=train_loader.steps_per_epoch,
    )
    loss_function = build_loss(values["loss"], splits, mixes=train_loader.augmentations.mixes).to(device)
    precision, steps = autocast(device, settings["precision"]), steps_of(train_loader, loop_settings.total_steps)
    training = Training(
        settings=loop_settings,
        state=state,
        step=build_step(values, state, loss_function, precision, steps=steps, images=dummies),
        loss_function=loss_function,
        autocast=precision,
        train_loader=train_loader,
        val_loader=val_loader,
        test_loader=test_loader,
        samples={name: len(split) for name, split in splits.by_name.items()},
        constant_accuracy=largest_share(splits.test.labels) if splits.test else None,
        device=device,
        channels_last=channels_last,
        record=record,
        weights_report=weights_report,
    )
    return training, splits


def build_early_stopping(options: EarlyStoppingOptions, *, mode: str) -> EarlyStopping:
    """Return the rule that ends a run whose metric does not improve; `mode` is min or max."""
    return EarlyStopping(
        monitor=options["monitor"],
        mode=mode,
        patience=options["patience"],
        min_delta=options["min_delta"],
        geometric=options["geometric"],
    )


def build_settings(values: TrainConfig, loader: TrainLoader, *, monitor_mode: str) -> Settings:
    """Return the settings of the loop, every duration in steps."""
    trainer, checkpoint = values["trainer"], values["trainer"]["checkpoint"]
    per_epoch = loader.steps_per_epoch
    total = total_steps(max_epochs=trainer["max_epochs"], max_steps=trainer["max_steps"], steps_per_epoch=per_epoch)
    if total is None:
        raise ConfigError("trainer.max_epochs", "set it or trainer.max_steps: schedules span the whole run", value=None)
    steps = steps_of(loader, total)
    return Settings(
        seed=values["seed"],
        total_steps=total,
        budget="max_steps" if total == trainer["max_steps"] else "max_epochs",
        max_minutes=trainer["max_minutes"],
        evaluate_every=steps(trainer["evaluate_every"]),
        log_every=steps(trainer["log_every"]),
        histograms_every=steps(trainer["histograms_every"]) if trainer["histograms_every"] else None,
        checkpoint_every=checkpoint["every_steps"],
        checkpoint_keep=checkpoint["keep"],
        monitor=checkpoint["monitor"],
        monitor_mode=monitor_mode,
        tta=trainer["tta"],
    )


def steps_of(loader: TrainLoader, total_steps: int) -> Callable[[str], int]:
    """Return the function that converts a duration, such as "2 epochs", to optimizer steps."""
    return partial(
        to_steps,
        steps_per_epoch=loader.steps_per_epoch,
        samples_per_epoch=loader.samples_per_epoch,
        total_steps=total_steps,
    )


def build_state(
    values: TrainConfig,
    model: nn.Module,
    *,
    early_stopping: EarlyStopping,
    normalisation: Normalisation,
    data: Mapping[str, Any],
    config: Mapping[str, Any],
    device: torch.device,
    total_steps: int,
    steps_per_epoch: int,
) -> TrainState:
    """Return the state of a new training: model, optimizer, schedule and the components with values of their own."""
    settings, sums = values["trainer"], RunningSums()
    decayed = decayed_parameters(model, settings["weight_decay_on"])
    frozen_later = {layer: trainable_parameters_of(model, layer) for layer in settings["freeze_after"] or {}}
    optimizer = build_optimizer(values["optimizer"], model, decayed=decayed, frozen_later=frozen_later, device=device)
    scale_biases(optimizer, settings["bias_lr_factor"], settings["weight_decay_on"])
    scaler = torch.amp.GradScaler(device.type, enabled=settings["precision"] == "fp16")
    guard = NonFiniteGuard(
        optimizer,
        scaler=scaler,
        device=device,
        skips=settings["on_nonfinite"] == "skip",
        steps_per_epoch=steps_per_epoch,
        buffers=list(model.buffers()),
        discard=sums.discard,
    )
    return TrainState(
        models={"model": model},
        optimizers={"optimizer": optimizer},
        schedule=build_schedule(values["schedule"], optimizer, total=total_steps, steps_per_epoch=steps_per_epoch),
        scaler=scaler,
        guard=guard,
        sums=sums,
        early_stopping=early_stopping,
        ema=ExponentialMovingAverage(model, decay=settings["ema_decay"]) if settings["ema_decay"] else None,
        lookahead=build_lookahead(settings["lookahead"], model),
        normalisation=normalisation,
        data=data,
        config=config,
        steps_per_epoch=steps_per_epoch,
    )


def build_lookahead(options: LookaheadOptions, model: nn.Module) -> Lookahead | None:
    """Return the slow weights of a model, if the config asks for them."""
    if options["every"] is None:
        return None
    return Lookahead(model, every=options["every"], decay=options["decay"], power=options["power"])
