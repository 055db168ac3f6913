"""Declarations of the options of a training: type, range, and whether a resumed run may change it.

Each option is a key of a TypedDict, so a type checker knows the type of every value that is read from a config. The
default and the comment of an option are its YAML line in configs/. These follow from a declaration:

    validation and its error messages             core.options.schema
    which keys a resumed run may change           FREE_ON_RESUME
    which keys two comparable runs may differ in  NOT_COMPARED

A section with a `_target_` also holds arguments of that class or function. Keys declared here are checked before torch
is imported; the builder checks the other arguments against the signature. The options of the other commands are
declared in core.options.commands.
"""

from typing import Annotated, Any, Literal, Required, TypedDict

from core.options.rules import integer, list_of, number, switched_off_by
from core.options.value_types import (
    FREE_ON_RESUME,
    NOT_COMPARED,
    Count,
    CountOrZero,
    Device,
    Duration,
    FilePath,
    Metric,
    Mode,
    NonNegative,
    OpenShare,
    Pixels,
    Positive,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    Switch,
)

SPLITS = ("train", "val", "test")


# train.py: sections with a `_target_`


class ModelOptions(TypedDict, total=False):
    """Section `model`."""

    _target_: Required[str]
    num_classes: Annotated[int, integer(2)] | None
    in_channels: Count


class DataOptions(TypedDict, total=False):
    """Section `data`: the keys of every data set (required), then arguments that several data sets take."""

    _target_: Required[str]
    image_size: Required[Pixels]
    stored_size: Required[Pixels | None]
    channels: Required[Literal[1, 3]]
    num_classes: Required[Annotated[int, integer(2)] | None]
    fit: Required[Literal["resize", "pad"]]
    val_fraction: Required[ShareBelowOne]
    limit_train: Required[Count | None]
    limit_eval: Required[Count | None]
    batch_size: Required[Count]  # free on resume together with trainer.accumulate: see BATCH_SIZE_KEYS
    eval_batch_size: Required[Count]
    drop_last: Required[Switch]
    mirror: Required[Annotated[bool, FREE_ON_RESUME, NOT_COMPARED]]
    num_workers: Required[Annotated[CountOrZero, FREE_ON_RESUME, NOT_COMPARED]]
    timeout_s: Required[Annotated[Positive, FREE_ON_RESUME, NOT_COMPARED]]
    memory_budget: Required[NonNegative]
    normalise: Required[Literal["none", "per_channel", "pca", "zca"]]
    whitening_epsilon: Required[Positive]

    root: Annotated[FilePath | None, FREE_ON_RESUME, NOT_COMPARED]
    download: Annotated[bool, FREE_ON_RESUME, NOT_COMPARED]
    test_fraction: ShareBelowOne
    on_bad_image: Annotated[Literal["error", "skip"], FREE_ON_RESUME, NOT_COMPARED]
    max_pixels: Count
    bits: Annotated[int, integer(8, 16)] | None
    cache_dir: Annotated[FilePath | None, FREE_ON_RESUME, NOT_COMPARED]


class OptimizerOptions(TypedDict, total=False):
    """Section `optimizer`."""

    _target_: Required[str]
    lr: Annotated[Positive, FREE_ON_RESUME]
    momentum: Annotated[ShareBelowOne, FREE_ON_RESUME]
    betas: Annotated[list[float], list_of(number(0, 1, without="high"), length=2)]
    eps: Positive
    weight_decay: Annotated[NonNegative, FREE_ON_RESUME]
    nesterov: bool
    alpha: ShareBelowOne
    centered: bool
    lr_decay: NonNegative
    initial_accumulator_value: NonNegative
    adamw_lr: Annotated[Positive | None, FREE_ON_RESUME]


class ScheduleOptions(TypedDict, total=False):
    """Section `schedule`."""

    _target_: Required[str]
    warmup_epochs: Annotated[float, number(0, 1e6)]
    warmup_start: ShareBelowOne
    momentum: Annotated[list[float], list_of(number(0, 1, without="low high"), length=2)] | None
    rise: OpenShare
    every: ShareAboveZero
    final: Share
    decay: NonNegative
    power: Positive
    periods: Annotated[int, integer(1, 100)]
    multiplier: Annotated[float, number(1, 1000)]
    start_divisor: Annotated[float, number(1)]
    final_divisor: Annotated[float, number(1)]
    interval: Literal["epoch", "step"]
    monitor: Metric
    mode: Mode


class LossOptions(TypedDict, total=False):
    """Section `loss`."""

    _target_: Required[str]
    auxiliary_weight: NonNegative | None
    delta: ShareAboveZero
    label_smoothing: ShareBelowOne
    class_weights: Literal["balanced"] | list[Positive] | dict[str, Positive] | None


# train.py: sections of the trainer


class EarlyStoppingOptions(TypedDict):
    """Section `trainer.early_stopping`."""

    monitor: Annotated[Metric, FREE_ON_RESUME]
    mode: Annotated[Mode, FREE_ON_RESUME]
    patience: Annotated[Count | None, FREE_ON_RESUME]
    min_delta: Annotated[NonNegative, FREE_ON_RESUME]
    geometric: Annotated[Annotated[float, number(1, without="low")] | None, FREE_ON_RESUME]


class LookaheadOptions(TypedDict):
    """Section `trainer.lookahead`."""

    every: Count | None
    decay: ShareBelowOne
    power: NonNegative


class CheckpointOptions(TypedDict):
    """Section `trainer.checkpoint`."""

    every_steps: Annotated[Count | None, FREE_ON_RESUME, NOT_COMPARED]
    keep: Annotated[Count | None, FREE_ON_RESUME, NOT_COMPARED]
    monitor: Metric | None
    mode: Mode


class TrainerOptions(TypedDict):
    """Section `trainer`."""

    max_epochs: Annotated[Count | None, FREE_ON_RESUME]
    max_steps: Annotated[Count | None, FREE_ON_RESUME]
    max_minutes: Annotated[Positive | None, FREE_ON_RESUME]
    device: Annotated[Device, FREE_ON_RESUME, NOT_COMPARED]
    threads: Annotated[Annotated[int, integer(1, 4096)] | None, FREE_ON_RESUME, NOT_COMPARED]
    precision: Literal["fp32", "bf16", "fp16"]
    tf32: Switch
    compile: bool
    cuda_graphs: bool
    channels_last: Switch
    deterministic: bool
    accumulate: Count  # free on resume together with data.batch_size: see BATCH_SIZE_KEYS
    clip_norm: Annotated[Positive | None, FREE_ON_RESUME]
    l1: NonNegative
    on_nonfinite: Annotated[Literal["stop", "skip"], FREE_ON_RESUME]
    ema_decay: OpenShare | None
    weight_decay_on: Literal["all", "weights"]
    bias_lr_factor: Positive
    freeze_after: dict[str, Duration] | None
    lookahead: LookaheadOptions
    tta: Literal["none", "mirror", "mirror_shift"]
    evaluate_every: Duration
    log_every: Annotated[Duration, FREE_ON_RESUME, NOT_COMPARED]
    histograms_every: Annotated[Duration | None, FREE_ON_RESUME, NOT_COMPARED]
    log_graph: Annotated[bool, FREE_ON_RESUME, NOT_COMPARED]
    log_images: Annotated[bool, FREE_ON_RESUME, NOT_COMPARED]
    early_stopping: Annotated[EarlyStoppingOptions, switched_off_by("trainer.early_stopping.patience=null")]
    checkpoint: CheckpointOptions


# Also free on resume if their product stays equal, so a run that was out of memory can continue in smaller batches.
BATCH_SIZE_KEYS = ("data.batch_size", "trainer.accumulate")


# The whole config


class TrainConfig(TypedDict):
    """The config of train.py, and of a run folder."""

    seed: CountOrZero
    name: Annotated[str | None, FREE_ON_RESUME, NOT_COMPARED]
    tags: Annotated[list[str], FREE_ON_RESUME, NOT_COMPARED]
    run_dir: Annotated[FilePath | None, NOT_COMPARED]
    resume: Annotated[FilePath | None, NOT_COMPARED]
    init_from: FilePath | None
    trust: Annotated[list[str], NOT_COMPARED]
    traceback: Annotated[bool, NOT_COMPARED]
    choices: dict[str, str]  # group -> the name of the option that was chosen; not a key of any YAML file
    model: ModelOptions
    data: DataOptions
    augment: dict[str, Any]  # step -> its class and arguments
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    loss: LossOptions
    trainer: TrainerOptions
