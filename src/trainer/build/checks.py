"""Checks of values that are valid alone, but contradict each other."""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from core.errors import ConfigError
from core.options.declarations import DataOptions, TrainConfig
from trainer.monitor.metrics import resolve_mode

log = logging.getLogger("preceptor.build")
ConfigOrRecord = TypeVar("ConfigOrRecord", TrainConfig, dict[str, Any])


def check_monitors(values: TrainConfig, *, has_val: bool) -> dict[str, str]:
    """Return the mode of each monitor, min or max; ConfigError if one watches a metric that this run lacks."""
    trainer, schedule = values["trainer"], values["schedule"]
    early_stopping, checkpoint = trainer["early_stopping"], trainer["checkpoint"]
    watched: dict[str, tuple[str | None, str]] = {
        "trainer.early_stopping": (early_stopping["monitor"], early_stopping["mode"]),
        "trainer.checkpoint": (checkpoint["monitor"], checkpoint["mode"]),
        "schedule": (schedule.get("monitor"), schedule.get("mode", "auto")),
    }
    modes: dict[str, str] = {}
    for name, (monitor, mode) in watched.items():
        if monitor is None:
            continue
        unused = name == "trainer.early_stopping" and early_stopping["patience"] is None
        if monitor.startswith("val/") and not has_val and not unused:
            raise ConfigError(
                f"{name}.monitor",
                "is not measured, as there is no validation split (data.val_fraction = 0); "
                "available: train/loss, train/accuracy",
                value=monitor,
            )
        modes[name] = resolve_mode(mode, monitor)
    return modes


def check_classes(values: TrainConfig) -> None:
    """Compare classes and channels of model and data, if the config has them, before any data is read."""
    wanted, given = values["data"]["num_classes"], values["model"].get("num_classes")
    if wanted is not None and given is not None and given != wanted:
        raise ConfigError("model.num_classes", f"the data has {wanted} classes (data.num_classes)", value=given)
    channels, given = values["data"]["channels"], values["model"].get("in_channels")
    if given is not None and given != channels:
        raise ConfigError(
            "model.in_channels", f"the data has {channels} (data.channels, which can be set to 1 or 3)", value=given
        )


def warn_of_mirroring(steps: Mapping[str, Any], values: TrainConfig) -> None:
    """Log a warning for each step and view that mirrors images whose mirror images have other labels."""
    if values["data"]["mirror"]:
        return
    mirroring = [f"augment.{name}" for name, step in steps.items() if getattr(step, "mirrors", False)]
    mirroring += [f"trainer.tta={values['trainer']['tta']}"] if values["trainer"]["tta"] != "none" else []
    for name in mirroring:
        log.warning(
            f"{name} mirrors images, but a mirror image in this data set has another label or none"
            " (data.mirror=false); leave it out"
        )


def check_sizes(data: DataOptions) -> None:
    """Raise ConfigError for stored images that are smaller than the model's input, or that are padded."""
    stored, size = data["stored_size"], data["image_size"]
    if stored is not None and data["fit"] != "resize":
        raise ConfigError("data.stored_size", "needs data.fit = resize", value=stored)
    if stored is not None and stored < size:
        raise ConfigError("data.stored_size", f"must be an integer >= data.image_size = {size}, or null", value=stored)


def with_classes(config: ConfigOrRecord, class_names: list[str]) -> ConfigOrRecord:
    """Return the config with the number of classes of the data."""
    count = len(class_names)
    filled: Any = dict(config)
    filled["data"] = {**config["data"], "num_classes": count}
    if "num_classes" in config["model"]:
        filled["model"] = {**config["model"], "num_classes": count}
        for name, node in config["model"].items():  # an external model is a node inside the adapter's
            if isinstance(node, Mapping) and "num_classes" in node:
                filled["model"][name] = {**node, "num_classes": node["num_classes"] or count}
    return cast(ConfigOrRecord, filled)
