"""Declarations of the options of every command but train.py, in the form that `core.options.declarations` explains."""

import re
from typing import Annotated, Any, Literal, Required, TypedDict

from core.options.declarations import TrainConfig
from core.options.rules import integer, like
from core.options.value_types import Count, CountOrZero, Device, FilePath, Metric, Positive, Share, ShareAboveZero

OBJECTIVE = re.compile(r"^(max|min) (\S+)$")
CONSTRAINT = re.compile(r"^(\S+) (<=|>=|<|>) ([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)$")


class SweepOptions(TypedDict):
    """Section `sweep`."""

    dir: FilePath | None
    name: str | None
    storage: str | None
    trials: Count | None
    parallel: Annotated[int, integer(1, 1000)]
    seeds: Annotated[int, integer(1, 1000)]
    minutes: Positive | None
    objectives: list[Annotated[str, like(OBJECTIVE, "max METRIC or min METRIC")]]
    constraints: list[Annotated[str, like(CONSTRAINT, "METRIC < NUMBER, or with >, <= or >=")]]
    sampler: Literal["random", "grid", "tpe", "cmaes", "nsga2"]
    startup: CountOrZero
    pruner: Literal["none", "median", "asha", "hyperband"]
    grace: Count
    reduction: Annotated[int, integer(2, 100)]
    retries: Annotated[int, integer(0, 100)]
    on_error: Literal["continue", "stop"]
    warm: bool
    stale_after: Annotated[int, integer(10)]
    space: dict[str, Any]


class SweepConfig(TrainConfig):
    """The config of sweep.py: the config of its trials, and the section `sweep`."""

    sweep: SweepOptions


class FindOptions(TypedDict, total=False):
    """Section `find`."""

    goal: Required[Literal["lr", "batch_size", "data"]]
    dir: Required[FilePath | None]
    steps: Count
    lowest: Positive
    highest: Positive
    smallest: Count
    largest: Count
    fractions: list[ShareAboveZero]
    seeds: Count


class FindConfig(TrainConfig):
    """The config of find.py: the config of the training, and the section `find`."""

    find: FindOptions


class LoadConfig(TypedDict):
    """Options of the commands that load a run."""

    checkpoint: Literal["best", "last"]
    device: Device
    trust: list[str]
    traceback: bool


class EvaluateConfig(LoadConfig):
    """The config of evaluate.py."""

    run: FilePath
    split: Literal["train", "val", "test", "all"]
    root: FilePath | None
    tta: Literal["none", "mirror", "mirror_shift"] | None
    output: FilePath | None


class PredictConfig(LoadConfig):
    """The config of predict.py."""

    run: FilePath
    input: FilePath
    output: FilePath
    on_bad_image: Literal["error", "skip"]
    batch_size: Count


class ReportOptions(TypedDict):
    """Section `report`."""

    human_error: Share | None
    groups: FilePath | None
    images: Count
    seconds: Positive
    metric: Metric | Literal["test/loss", "test/accuracy"]


class ReportConfig(LoadConfig):
    """The config of report.py."""

    run: FilePath | list[FilePath]
    output: FilePath | None
    root: FilePath | None
    report: ReportOptions


class ConvertConfig(TypedDict):
    """The config of convert.py."""

    input: FilePath
    output: FilePath
    traceback: bool


class WhereOptions(TypedDict):
    """Section `where` of runs.py."""

    model: str | None
    data: str | None
    name: str | None
    status: str | None
    tags: list[str]
    debug: bool


class RunsConfig(TypedDict):
    """The config of runs.py."""

    folder: FilePath
    sort: str
    where: WhereOptions
    output: FilePath | None
    curves: FilePath | None
    traceback: bool
