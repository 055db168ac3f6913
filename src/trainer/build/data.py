"""Build the data of a training from the sections `data` and `augment`: splits, augmentation, loaders."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from core.errors import ConfigError
from core.options.declarations import DataOptions, TrainConfig
from data.augment.per_sample import PerSampleTransform
from data.augment.pipeline import Augmentations
from data.loading.loaders import EvalLoader, TrainLoader
from data.loading.normalisation import Normalisation, covariance
from data.sources.collection import Collection
from data.sources.splits import Splits, measured, prepare
from trainer.build.checks import check_sizes
from trainer.build.dry_run import check_augmentation
from trainer.build.instantiate import check_arguments, construct, parameters_of, resolve

# Splitting and loading read the keys of every data set; all others are for the function that `_target_` names.
SPLITTING_KEYS = DataOptions.__required_keys__ & inspect.signature(prepare).parameters.keys()


def build_data(node: DataOptions, *, seed: int, normalisation: Normalisation | None = None) -> Splits:
    """Return the splits of the data set that `data._target_` names.

    The function gets the keys that are parameters of it. Without a `normalisation`, one is fitted on the train split.
    Raises ConfigError for other keys, and DataError if the data cannot be read.
    """
    function = resolve("data", node["_target_"])
    takes = parameters_of(function) or {}
    arguments = {key: value for key, value in node.items() if key in takes}
    check_arguments(node, "data", also=DataOptions.__required_keys__)
    collection = construct({"_target_": node["_target_"], **arguments}, "data")
    if not isinstance(collection, Collection):
        raise ConfigError("data._target_", "must give a data.sources.collection.Collection", value=node["_target_"])
    splitting: dict[str, Any] = {key: value for key, value in node.items() if key in SPLITTING_KEYS}
    try:
        return prepare(collection, seed=seed, normalisation=normalisation, **splitting)
    except ConfigError as error:
        raise error.under("data") from None


def build_augmentation(nodes: Mapping[str, Any], data: DataOptions) -> dict[str, Any]:
    """Return the augmentation steps of a config, in order, after a dry run.

    A class that is not built in is applied to one image at a time. No data is needed, so errors are raised before the
    first image is decoded.
    """
    check_sizes(data)
    steps: dict[str, Any] = {}
    for name, node in nodes.items():
        step = construct(node, f"augment.{name}")
        own = hasattr(step, "num_random_values")
        steps[name] = step if own else PerSampleTransform(step, name=f"augment.{name}", image_size=data["image_size"])
    check_augmentation(steps, data)
    return steps


def build_loaders(
    values: TrainConfig,
    splits: Splits,
    augmentation: Mapping[str, Any],
    *,
    normalisation: Normalisation,
    device: torch.device,
) -> tuple[TrainLoader, EvalLoader | None, EvalLoader | None]:
    """Return the loaders of the train, val and test splits."""
    data, seed = values["data"], values["seed"]
    shared: dict[str, Any] = {"normalisation": normalisation, "device": device}
    shared |= {"num_workers": data["num_workers"], "timeout_s": data["timeout_s"]}
    if fitted := [step for step in augmentation.values() if hasattr(step, "fit")]:
        colours = covariance(measured(splits.train, image_size=data["image_size"], seed=seed))
        for step in fitted:
            step.fit(*colours)
    train = TrainLoader(
        splits.train,
        batch_size=data["batch_size"],
        accumulate=values["trainer"]["accumulate"],
        seed=seed,
        augmentations=Augmentations(augmentation, seed=seed, num_classes=len(splits.class_names)),
        drop_last=data["drop_last"],
        **shared,
    )
    val, test = (
        EvalLoader(split, batch_size=data["eval_batch_size"], **shared) if split else None
        for split in (splits.val, splits.test)
    )
    return train, val, test
