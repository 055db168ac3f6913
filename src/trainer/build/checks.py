"""What can be wrong between keys, each right by itself."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from core.errors import ConfigError
from core.options.declarations import DataOptions, TrainConfig
from trainer.monitor.metrics import resolve_mode

ConfigOrRecord = TypeVar("ConfigOrRecord", TrainConfig, dict[str, Any])


def check_monitors(values: TrainConfig, *, has_val: bool) -> dict[str, str]:
    """The mode of each monitor; ConfigError where one watches a metric that this run does not produce."""
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
                "is not produced, as there is no validation part (data.val_fraction = 0); "
                "available: train/loss, train/accuracy",
                value=monitor,
            )
        modes[name] = resolve_mode(mode, monitor)
    return modes


def check_classes(values: TrainConfig) -> None:
    """Classes and channels, before any data is read: where the config says them."""
    wanted, given = values["data"]["num_classes"], values["model"].get("num_classes")
    if wanted is not None and given is not None and given != wanted:
        raise ConfigError("model.num_classes", f"the data has {wanted} classes (data.num_classes)", value=given)
    channels, given = values["data"]["channels"], values["model"].get("in_channels")
    if given is not None and given != channels:
        raise ConfigError(
            "model.in_channels", f"the data has {channels} (data.channels, which can be set to 1 or 3)", value=given
        )


def check_sizes(data: DataOptions) -> None:
    """Stored images are no smaller than what the network sees, and whole."""
    stored, size = data["stored_size"], data["image_size"]
    if stored is not None and data["fit"] != "resize":
        raise ConfigError("data.stored_size", "needs data.fit = resize", value=stored)
    if stored is not None and stored < size:
        raise ConfigError("data.stored_size", f"must be an integer >= data.image_size = {size}, or null", value=stored)


def with_classes(config: ConfigOrRecord, class_names: list[str]) -> ConfigOrRecord:
    """The config with the number of classes that was counted in a folder."""
    count = len(class_names)
    filled: Any = dict(config)
    filled["data"] = {**config["data"], "num_classes": count}
    if "num_classes" in config["model"]:
        filled["model"] = {**config["model"], "num_classes": count}
        for name, node in config["model"].items():  # a network from elsewhere stands within the adapter
            if isinstance(node, Mapping) and "num_classes" in node:
                filled["model"][name] = {**node, "num_classes": node["num_classes"] or count}
    return cast(ConfigOrRecord, filled)
