"""The plan of a sweep: its settings, the config that all trials share, and the config of each trial."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, NSGAIISampler, RandomSampler, TPESampler

from core.config import Config, leaves
from core.errors import ConfigError, suggest
from core.options.commands import CONSTRAINT, OBJECTIVE, SweepConfig, SweepOptions
from core.options.declarations import TrainConfig
from core.options.schema import is_compared
from core.seeding import fold
from sweeps.define.compose import compose_trial
from sweeps.define.space import Dimension, grid, overrides, read_space
from sweeps.execute.database import experimental

# Metrics of every evaluation, and all metrics that an objective or a constraint can name.
EVALUATED = tuple(f"{split}/{name}" for split in ("train", "val") for name in ("loss", "accuracy"))
MEASURED = (*EVALUATED, "parameters", "seconds", "latency_ms")


@dataclass(frozen=True)
class Constraint:
    """A bound on a metric, such as `parameters < 1e5`."""

    metric: str
    sign: str  # <, <=, > or >=
    bound: float

    def violation(self, value: float) -> float:
        """Return by how much a value violates the constraint, relative to the bound.

        The result is <= 0 if the constraint holds. If the bound is 0, the result is absolute.
        """
        excess = (value - self.bound if "<" in self.sign else self.bound - value) / (abs(self.bound) or 1.0)
        # A strict sign excludes the bound itself: the violation must be > 0, as small as possible.
        return 1e-12 if excess == 0 and "=" not in self.sign else excess

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Plan:
    """The checked plan of a sweep."""

    options: SweepOptions  # the values of the config section `sweep`
    folder: Path  # of the sweep; contains the run folders of its trials
    space: list[Dimension]
    objectives: list[tuple[str, str]]  # (maximize or minimize, metric)
    constraints: list[Constraint]
    base: Config[TrainConfig]  # the config of a trial without sampled values
    shared_overrides: list[str]  # of all trials: those of the command line, and defaults of a sweep
    config_dirs: list[str]  # folders of --config-dir
    points: list[dict[str, Any]]  # of a grid, as parameters of the study; empty for other samplers

    @property
    def name(self) -> str:
        """The name of the sweep in reports: sweep.name, else the name of its folder."""
        return self.options["name"] or self.folder.resolve().name

    @property
    def trials(self) -> int:
        """The number of trials: sweep.trials, but at most the number of points of a grid."""
        limit = self.options["trials"]
        if self.points:
            return min(limit or len(self.points), len(self.points))
        assert limit is not None  # read_plan checks it
        return limit

    @property
    def prunes(self) -> bool:
        """Whether the sweep has a pruner."""
        return self.options["pruner"] != "none"

    @property
    def measures_latency(self) -> bool:
        """Whether an objective or a constraint is the latency of one image."""
        bounded = [constraint.metric for constraint in self.constraints]
        return "latency_ms" in [metric for _, metric in self.objectives] + bounded

    def definition(self) -> dict[str, Any]:
        """Return the settings, by key, that all trials of a study must share to be comparable.

        The store compares them when the sweep is started again, or on another machine.
        """
        values = dict(leaves(self.base.record))
        config = {name: value for name, value in values.items() if is_compared(name) and not isinstance(value, dict)}
        space = {f"sweep.space.{dimension.key}": dimension.definition() for dimension in self.space}
        method = ("objectives", "constraints", "sampler", "pruner", "seeds", "grace", "reduction", "startup")
        return {**config, **space, **{f"sweep.{key}": dict(self.options)[key] for key in method}}

    def sampler(self, number: int) -> BaseSampler:
        """Return the sampler of the trial with this number.

        Its seed is a function of the sweep's seed and the number. So a random search that was killed continues with the
        same points, and several processes sample different points.
        """
        seed = fold(self.base.values["seed"], "sweep", number) % 2**32
        startup = self.options["startup"]
        samplers: dict[str, Callable[..., BaseSampler]] = {
            "random": RandomSampler,
            "grid": RandomSampler,  # not used: the sweep sets the parameters of each trial to a point of the grid
            "tpe": partial(TPESampler, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True),
            "cmaes": partial(CmaEsSampler, n_startup_trials=max(1, startup), warn_independent_sampling=False),
            "nsga2": partial(NSGAIISampler, population_size=max(2, startup)),
        }
        with experimental():
            return samplers[self.options["sampler"]](seed=seed)

    def pruner(self) -> BasePruner:
        """Return the pruner. Its resource, in the terms of ASHA and Hyperband, is the number of evaluations."""
        grace, reduction = self.options["grace"], self.options["reduction"]
        if self.options["pruner"] == "median":
            return MedianPruner(n_startup_trials=self.options["startup"], n_warmup_steps=grace)
        if self.options["pruner"] == "asha":
            return SuccessiveHalvingPruner(min_resource=grace, reduction_factor=reduction)
        if self.options["pruner"] == "hyperband":
            max_evaluations = max(grace, self.base.values["trainer"]["max_epochs"] or 100)  # assumes one per epoch
            return HyperbandPruner(min_resource=grace, max_resource=max_evaluations, reduction_factor=reduction)
        return NopPruner()

    def arguments(self, point: Mapping[str, Any]) -> list[str]:
        """Return the overrides of a trial: the shared ones, then the config values of its point."""
        return [*self.shared_overrides, *overrides(point, dict(leaves(self.base.values)))]

    def run_folder(self, number: int, seed_index: int) -> Path:
        """Return the run folder of a trial's training with seed number `seed_index`, which counts from 0."""
        suffix = f"-seed-{seed_index}" if self.options["seeds"] > 1 else ""
        return self.folder / f"trial-{number:04}{suffix}"


def read_plan(config: Config[SweepConfig]) -> Plan:
    """Return the plan of a composed config of sweep.yaml.

    Raises ConfigError for settings that are not allowed, also for values of the search space: `_dry_run` composes them.
    """
    options = config.values["sweep"]
    if config.job is not None:
        raise ConfigError("--multirun", "a sweep starts its trials itself; set sweep.trials and sweep.space instead")
    for name in ("resume", "run_dir"):
        if config.values[name] is not None:
            raise ConfigError(
                name, "cannot be set in a sweep; set sweep.dir, and use the same command to resume the sweep"
            )
    shared = [item for item in config.overrides if not item.lstrip("+~").startswith("sweep.")]
    space = read_space(options["space"])
    objectives = [_objective(text) for text in options["objectives"]]
    if not objectives:
        raise ConfigError("sweep.objectives", "must contain at least one objective, such as max val/accuracy", value=[])
    if len(objectives) > 1 and options["pruner"] != "none":
        # With several objectives, it is undefined which of two trials is the worse one.
        explanation = f"cannot prune for {len(objectives)} objectives; set sweep.pruner=none"
        raise ConfigError("sweep.pruner", explanation, value=options["pruner"])
    if len(objectives) > 1 and options["sampler"] == "cmaes":
        raise ConfigError("sweep.sampler", "optimises one objective only; use nsga2, tpe or random", value="cmaes")
    if options["pruner"] != "none" and objectives[0][1] not in EVALUATED:
        explanation = f"needs an objective that every evaluation measures ({', '.join(EVALUATED)})"
        raise ConfigError("sweep.pruner", explanation, value=options["pruner"])
    if options["sampler"] == "grid":
        points = grid(space)
    elif options["trials"] is None:
        raise ConfigError("sweep.trials", "must be an integer >= 1; null (all points) is for sampler=grid", value=None)
    else:
        points = []
    monitor = next((metric for _, metric in objectives if metric in EVALUATED), None)
    # Defaults of a sweep come first, because later overrides, those of the user, replace them.
    if monitor is not None:  # the best checkpoint of a trial is the best by the objective
        shared.insert(0, f"trainer.checkpoint.monitor={monitor}")
    if config.values["trainer"]["threads"] is None:
        share = max(1, len(os.sched_getaffinity(0)) // options["parallel"])
        shared.insert(0, f"trainer.threads={share}")
    name = options["name"] or config.values["choices"].get("sweep", "sweep")
    plan = Plan(
        options=options,
        folder=Path(options["dir"] or f"outputs/sweep-{name}"),
        space=space,
        objectives=objectives,
        constraints=[_constraint(text) for text in options["constraints"]],
        base=compose_trial(shared, config.config_dirs),
        shared_overrides=shared,
        config_dirs=config.config_dirs,
        points=points,
    )
    _dry_run(plan)
    return plan


def _dry_run(plan: Plan) -> None:
    """Compose configs that together contain each option and each bound of the search space.

    Raises ConfigError for the first invalid value, before any trial starts.
    """
    untested = {dimension.key: list(dimension.options) for dimension in plan.space}
    while any(untested.values()):
        point: dict[str, Any] = {}
        # Test the last dimension first: the values that its condition requires are options of earlier dimensions, which
        # are tested at the same time.
        tested = next(dimension for dimension in reversed(plan.space) if untested[dimension.key])
        condition = {key: values[0] for key, values in tested.when}
        for dimension in plan.space:
            if dimension.key in condition:
                point[dimension.key] = condition[dimension.key]
            elif dimension.is_used(point) or dimension is tested:
                point[dimension.key] = (untested[dimension.key] or dimension.options)[0]
            if point.get(dimension.key) in untested[dimension.key]:
                untested[dimension.key].remove(point[dimension.key])
        compose_trial(plan.arguments(point), plan.config_dirs)


def _objective(text: str) -> tuple[str, str]:
    """Return ("maximize" or "minimize", metric) of an objective such as `max val/accuracy`. Raises ConfigError."""
    match = OBJECTIVE.match(text)
    assert match is not None  # the schema checks it
    _check_metric(match[2], "sweep.objectives")
    return {"max": "maximize", "min": "minimize"}[match[1]], match[2]


def _constraint(text: str) -> Constraint:
    """Return the constraint of a text such as `parameters < 1e5`. Raises ConfigError for an unknown metric."""
    match = CONSTRAINT.match(text)
    assert match is not None  # the schema checks it
    _check_metric(match[1], "sweep.constraints")
    return Constraint(match[1], match[2], float(match[3]))


def _check_metric(name: str, key: str) -> None:
    """Raise ConfigError, with `key` as the config key, for a metric that trials do not measure."""
    if name not in MEASURED:
        hint = suggest(name, MEASURED)
        raise ConfigError(key, f"must be one of {', '.join(MEASURED)}" + (f"; {hint}" if hint else ""), value=name)
