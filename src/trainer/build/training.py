"""From a config to the objects it names: the one place that instantiates.

    config -> device -> data -> network -> optimizer, schedule, loss -> trainer -> run folder

Whatever can be wrong is found here, before the first step, and told by its key. A config that comes with a run folder
builds only classes that are trusted (`refuse_untrusted`).
"""

import inspect
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from core.config import Config
from core.errors import ConfigError, PreceptorError
from core.schema import TRAIN
from core.seeding import fold
from data.augment.per_sample import ASampleAtATime
from data.augment.pipeline import Augmentations
from data.loading.loaders import EvalLoader, TrainLoader
from data.loading.normalisation import covariance
from data.sources import datasets
from data.sources.splits import Splits, measured, prepare, sample
from trainer.begin import Notices, begin, go_on
from trainer.build.checks import check_classes, check_monitors, check_sizes, with_classes
from trainer.build.dry_run import try_out, try_out_one, try_out_steps
from trainer.build.durations import to_steps, total_steps, warmup_steps
from trainer.build.targets import check_arguments, parameters_of, resolve
from trainer.build.trust import refuse_untrusted, without_downloads
from trainer.build.weights import fit_to, init_from
from trainer.device import autocast, choose_device, configure_torch
from trainer.loop import Trainer
from trainer.monitor.early_stopping import EarlyStopping
from trainer.monitor.metrics import resolve_mode
from trainer.optim.ema import ExponentialMovingAverage
from trainer.optim.losses import balanced_weights
from trainer.optim.muon import Muon, decayed_parameters, fill_momentum, group_parameters, scale_biases
from trainer.optim.schedules import FactorSchedule, Plateau, Schedule, TorchScheduler, momentum_of, one_cycle_momentum
from trainer.settings import Settings
from trainer.storage.run_folder import provenance

FITTED = 1000  # training pictures that a network may fit itself to; 600 MB at 224 px

# Keys of every data set's config that splitting and loading read; the rest is for the function that it names.
SHARED_DATA_KEYS = [name.removeprefix("data.") for name in TRAIN if name.startswith("data.")]


def build(config: Config) -> Trainer | None:
    """A trainer that stands where its run goes on: at step 0 of a new folder, or where a resumed run was.

    None for a resumed run that is finished already.
    """
    with ExitStack() as stack:
        notices = stack.enter_context(Notices())
        trainer, splits, weights_report = assemble(config)
        stack.enter_context(trainer.interrupts)  # from here on a signal finds a run to save
        if config.from_run:
            if not go_on(trainer, config, stack):
                return None
        else:
            begin(trainer, config, splits, weights_report, stack)
        notices.tell(trainer.warn)
        trainer.closing = stack.pop_all()
        return trainer


def assemble(config: Config) -> tuple[Trainer, Splits, list[str]]:
    """A trainer without a folder, the data it was made for, and what was said of the weights it starts from."""
    values = config.values
    settings = values["trainer"]
    device = choose_device(settings["device"], settings["precision"])
    configure_torch(settings, device)
    if config.from_run:
        values = without_downloads(values)
        refuse_untrusted(values, trust=values["trust"])
    check_classes(values)
    augment = build_steps(values["augment"], values["data"])

    splits = build_data(values["data"], seed=values["seed"])
    monitors = check_monitors(values, has_val=splits.val is not None)
    record = with_classes(config.record, splits.class_names)
    values = with_classes(values, splits.class_names)
    model = build_model(values, init_seed=fold(values["seed"], "init"))
    try_out(model, values)
    weights_report: list[str] = []
    if not config.from_run:
        if hasattr(model, "fit"):
            pictures = sample(
                splits.train, count=FITTED, image_size=values["data"]["image_size"], seed=fold(values["seed"], "fit")
            )
            fit_to(splits.normalisation(pictures), model)
        if values["init_from"]:
            weights_report = init_from(Path(values["init_from"]), model, shown=record["init_from"])
    wants_channels_last = settings["channels_last"]
    if wants_channels_last == "auto":
        wants_channels_last = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if wants_channels_last:
        model.to(memory_format=torch.channels_last)
    model.to(device)

    normalisation = splits.normalisation.to(device, channels_last=wants_channels_last)
    reading = {key: values["data"][key] for key in ("num_workers", "timeout_s")}
    shared = {"normalisation": normalisation, "device": device, **reading}
    if fitted := [step for step in augment.values() if hasattr(step, "fit")]:
        colours = covariance(measured(splits.train, image_size=values["data"]["image_size"], seed=values["seed"]))
        for step in fitted:
            step.fit(*colours)
    augmentations = Augmentations(augment, seed=values["seed"], num_classes=len(splits.class_names))
    train_loader = TrainLoader(
        splits.train,
        batch_size=values["data"]["batch_size"],
        accumulate=settings["accumulate"],
        seed=values["seed"],
        augmentations=augmentations,
        drop_last=values["data"]["drop_last"],
        **shared,
    )
    if train_loader.smallest_batch == 1:
        try_out_one(model, values, device)
    eval_size = values["data"]["eval_batch_size"]
    per_epoch = train_loader.steps_per_epoch
    total = total_steps(max_epochs=settings["max_epochs"], max_steps=settings["max_steps"], steps_per_epoch=per_epoch)
    if total is None:
        raise ConfigError("trainer.max_epochs", "set it or trainer.max_steps: schedules span the whole run", value=None)
    steps = partial(
        to_steps, steps_per_epoch=per_epoch, samples_per_epoch=train_loader.samples_per_epoch, total_steps=total
    )
    every = {key: settings[key] and steps(settings[key]) for key in ("evaluate_every", "log_every", "histograms_every")}
    decayed = decayed_parameters(model, settings["weight_decay_on"])
    optimizer = build_optimizer(values["optimizer"], model, decayed=decayed, device=device)
    scale_biases(optimizer, settings["bias_lr_factor"], settings["weight_decay_on"])
    trainer = Trainer(
        settings=Settings(
            seed=values["seed"],
            total_steps=total,
            max_minutes=settings["max_minutes"],
            **every,
            checkpoint_every=settings["checkpoint"]["every_steps"],
            checkpoint_keep=settings["checkpoint"]["keep"],
            monitor=settings["checkpoint"]["monitor"],
            monitor_mode=monitors.get("trainer.checkpoint", "min"),
            clip_norm=settings["clip_norm"],
            l1=settings["l1"],
            skips=settings["on_nonfinite"] == "skip",
            tta=settings["tta"],
            budget="max_steps" if total == settings["max_steps"] else "max_epochs",
        ),
        model=model,
        forward=torch.compile(model) if settings["compile"] else model,  # type: ignore[arg-type]
        loss_function=build_loss(values["loss"], splits, mixes=augmentations.mixes).to(device),
        auxiliary_weight=weigh_auxiliary(values["loss"], model),
        penalised=decayed,
        optimizer=optimizer,
        schedule=build_schedule(values["schedule"], optimizer, total=total, steps_per_epoch=per_epoch),
        train_loader=train_loader,
        val_loader=EvalLoader(splits.val, batch_size=eval_size, **shared) if splits.val else None,
        test_loader=EvalLoader(splits.test, batch_size=eval_size, **shared) if splits.test else None,
        early_stopping=EarlyStopping(
            **{**settings["early_stopping"], "mode": monitors["trainer.early_stopping"]},
        ),
        ema=ExponentialMovingAverage(model, decay=settings["ema_decay"]) if settings["ema_decay"] else None,
        autocast=autocast(device, settings["precision"]),
        scaler=torch.amp.GradScaler(device.type, enabled=settings["precision"] == "fp16"),
        device=device,
        data_values={
            "class_names": splits.class_names,
            "fingerprint": splits.fingerprint,
            "counts": splits.counts,
        },
        normalisation=normalisation,
        record=record,
        provenance={
            **provenance(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        },
    )
    return trainer, splits, weights_report


def construct(node: Mapping[str, Any], section: str, **extra: Any) -> Any:
    """Instantiate a config node; an argument that its class does not take, or refuses, is told by its key."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{section}._target_", "missing: the class or function to build")
    check_arguments(node, section, given=extra)
    try:
        return instantiate(dict(node), **extra, _convert_="all")
    except InstantiationException as exception:
        cause = exception.__cause__
        if isinstance(cause, ConfigError):
            raise cause.under(section) from None
        if isinstance(cause, PreceptorError):
            raise cause from None
        raise ConfigError(section, str(cause or exception), value=node["_target_"]) from exception


def build_data(node: Mapping[str, Any], *, seed: int) -> Splits:
    """The data set that a config names, read, split and measured; its function gets the keys its signature names."""
    function = resolve("data", node["_target_"])
    takes = parameters_of(function) or {}
    arguments = {key: value for key, value in node.items() if key in takes}
    check_arguments(node, "data", also=SHARED_DATA_KEYS)
    collection = construct({"_target_": node["_target_"], **arguments}, "data")
    if not isinstance(collection, datasets.Collection):
        raise ConfigError("data._target_", "must give a data.sources.datasets.Collection", value=node["_target_"])
    keys = [key for key in inspect.signature(prepare).parameters if key in node]
    try:
        return prepare(collection, seed=seed, **{key: node[key] for key in keys})
    except ConfigError as error:
        raise error.under("data") from None


def build_steps(nodes: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The augmentation steps of a config, in order, tried out; a class that is no step of ours is taken for a
    transform. No data is needed: what is wrong is told before any picture is decoded."""
    check_sizes(data)
    steps: dict[str, Any] = {}
    for name, node in nodes.items():
        step = construct(node, f"augment.{name}")
        own = hasattr(step, "numbers")
        steps[name] = step if own else ASampleAtATime(step, name=f"augment.{name}", image_size=data["image_size"])
    try_out_steps(steps, data)
    return steps


def build_model(values: Mapping[str, Any], *, init_seed: int) -> nn.Module:
    """The network, its initial weights a function of the seed."""
    torch.manual_seed(init_seed)
    model = construct(values["model"], "model")
    if not isinstance(model, nn.Module):
        raise ConfigError("model._target_", "must build a torch.nn.Module", value=values["model"]["_target_"])
    return model


def build_loss(node: Mapping[str, Any], splits: Splits, *, mixes: bool) -> nn.Module:
    """The loss, tried out on what augmentation makes of labels; `balanced` weights come from the training part."""
    count = len(splits.class_names)
    weights = node.get("class_weights")
    if weights == "balanced":
        node = {**node, "class_weights": balanced_weights(splits.train.labels, count)}
    elif weights is not None and len(weights) != count:
        raise ConfigError("loss.class_weights", f"must be a list of {count}, one a class", value=weights)
    takes = parameters_of(resolve("loss", node["_target_"])) or {}
    # A loss from elsewhere, put in the place of ours, need not take what is not set.
    given = {key: value for key, value in node.items() if key != "auxiliary_weight" and (value or key in takes)}
    loss = construct(given, "loss")
    targets = torch.full((2, count), 1 / count) if mixes else torch.zeros(2, dtype=torch.long)
    try:
        value = loss(torch.zeros(2, count), targets)
    except (RuntimeError, ValueError, IndexError, TypeError) as exception:
        kind = "probabilities, which mixing makes of labels" if mixes else "logits and labels"
        raise ConfigError("loss", f"does not take {kind}: {exception}", value=node["_target_"]) from None
    if not isinstance(value, torch.Tensor) or value.ndim > 0:
        raise ConfigError("loss", "must give one number for a batch, a tensor", value=node["_target_"])
    return loss


def weigh_auxiliary(node: Mapping[str, Any], model: nn.Module) -> float:
    """The weight of each auxiliary head's loss: the config's, else the network's own, else GoogLeNet's."""
    weight = node.get("auxiliary_weight")
    return getattr(model, "auxiliary_weight", 0.3) if weight is None else weight


def build_optimizer(
    node: Mapping[str, Any], model: nn.Module, *, decayed: Collection[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer over its groups of parameters; one of them is spared weight decay where some are not `decayed`."""
    if "lr" not in node:
        raise ConfigError("optimizer.lr", "missing: the learning rate, a number > 0")
    target = resolve("optimizer", node["_target_"])
    is_torchs = str(getattr(target, "__module__", "")).startswith("torch.optim")
    takes_fused = is_torchs and "fused" in (parameters_of(target) or {}) and not node.get("foreach")
    # One kernel a step: 2.5 to 4 times as fast on a CPU, and on CUDA it can be told on the device to skip. Adagrad's is
    # for the CPU alone in older versions of torch.
    if takes_fused and (device.type == "cpu" or target is not torch.optim.Adagrad):
        node = {"fused": True, **node}
    make = construct({**node, "_partial_": True}, "optimizer")
    try:
        optimizer = make(group_parameters(model, decayed=decayed, with_muon=target is Muon))
    except ConfigError as error:
        raise error.under("optimizer") from None
    except (TypeError, ValueError, RuntimeError) as exception:
        raise ConfigError("optimizer", str(exception), value=node["_target_"]) from None
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "optimizer._target_", "must be an optimizer that steps without a closure", value=node["_target_"]
        )
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["fused"]:
        fill_momentum(optimizer)
    return optimizer


def build_schedule(
    node: Mapping[str, Any], optimizer: torch.optim.Optimizer, *, total: int, steps_per_epoch: int
) -> Schedule:
    """The schedule over the groups' rates."""
    rates = [group["lr"] for group in optimizer.param_groups]
    own = {key: value for key, value in node.items() if key not in ("warmup_epochs", "interval", "momentum")}
    target = resolve("schedule", node["_target_"])
    if target is ReduceLROnPlateau:
        raise ConfigError("schedule._target_", "watches a metric; use schedule=plateau", value=node["_target_"])
    if inspect.isclass(target) and issubclass(target, LRScheduler):
        try:
            scheduler = construct({**own, "_partial_": True}, "schedule")(optimizer)
        except (TypeError, ValueError) as exception:
            raise ConfigError("schedule", str(exception), value=node["_target_"]) from None
        return TorchScheduler(scheduler, interval=node.get("interval", "epoch"), steps_per_epoch=steps_per_epoch)
    warmup = warmup_steps(node.get("warmup_epochs", 0), steps_per_epoch=steps_per_epoch)
    if warmup >= total:
        raise ConfigError(
            "schedule.warmup_epochs",
            f"{warmup:,} steps of warm-up leave nothing of a run of {total:,}",
            value=node["warmup_epochs"],
        )
    if target is Plateau:
        own["mode"] = resolve_mode(node["mode"], node["monitor"])
        return construct(own, "schedule", base_rates=rates, warmup_steps=warmup)
    made = construct({**own, "_partial_": True}, "schedule")
    factor = partial(made.func, *made.args, **made.keywords)  # Hydra's partial looks at its target again at each call
    momentum = None
    if node.get("momentum") is not None:
        if "rise" not in node:
            raise ConfigError("schedule.momentum", "needs schedule.rise beside it, as in schedule=one_cycle")
        if not any(momentum_of(group) for group in optimizer.param_groups):
            raise ConfigError("schedule.momentum", "this optimizer has none, or 0; set null", value=node["momentum"])
        low, high = node["momentum"]  # the schema has seen to its form
        if low > high:
            raise ConfigError("schedule.momentum", "must be [lowest, highest]", value=node["momentum"])
        momentum = partial(one_cycle_momentum, low=low, high=high, rise=node["rise"])
    try:
        factor(0, total, warmup)
    except ConfigError as error:
        raise error.under("schedule") from None
    except TypeError as exception:
        raise ConfigError("schedule", str(exception), value=node["_target_"]) from None
    return FactorSchedule(factor, base_rates=rates, total_steps=total, warmup_steps=warmup, momentum=momentum)
