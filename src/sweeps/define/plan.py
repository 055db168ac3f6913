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
from core.options.declarations import CONSTRAINT, OBJECTIVE, SweepConfig, SweepOptions, TrainConfig
from core.options.schema import is_compared
from core.seeding import fold
from sweeps.define.compose import compose_trial
from sweeps.define.space import Dimension, grid, overrides, read_space
from sweeps.execute.database import experimental

EVALUATED = tuple(f"{split}/{name}" for split in ("train", "val") for name in ("loss", "accuracy"))
MEASURED = (*EVALUATED, "parameters", "seconds", "latency_ms")


@dataclass(frozen=True)
class Constraint:
    """A bound on a metric."""

    metric: str
    sign: str
    bound: float

    def violation(self, value: float) -> float:
        """Return by how much a value violates the constraint, relative to the bound; <= 0 if it is met."""
        excess = (value - self.bound if "<" in self.sign else self.bound - value) / (abs(self.bound) or 1.0)
        return 1e-12 if excess == 0 and "=" not in self.sign else excess

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Plan:
    """The checked plan of a sweep. `options` are the values of the config's section `sweep`."""

    options: SweepOptions
    folder: Path
    space: list[Dimension]
    objectives: list[tuple[str, str]]  # (maximize or minimize, metric)
    constraints: list[Constraint]
    base: Config[TrainConfig]  # the config of a trial without sampled values
    given: list[str]  # overrides of the command line, which all trials share
    config_dirs: list[str]  # folders of --config-dir
    points: list[dict[str, Any]]  # the points of a grid; empty for other samplers

    @property
    def name(self) -> str:
        """The name of the study."""
        return self.options["name"] or self.folder.resolve().name

    @property
    def trials(self) -> int:
        """The number of trials."""
        wanted = self.options["trials"]
        if self.points:
            return min(wanted or len(self.points), len(self.points))
        assert wanted is not None  # read_plan checks it
        return wanted

    @property
    def prunes(self) -> bool:
        """Return whether trials may be pruned."""
        return self.options["pruner"] != "none"

    @property
    def measures_latency(self) -> bool:
        """Return whether an objective or constraint needs the latency of one image."""
        return "latency_ms" in [metric for _, metric in self.objectives] + [each.metric for each in self.constraints]

    def definition(self) -> dict[str, Any]:
        """Return the settings that must be equal for trials to be comparable, after a restart or on another machine."""
        known = dict(leaves(self.base.record))
        config = {name: value for name, value in known.items() if is_compared(name) and not isinstance(value, dict)}
        space = {
            f"sweep.space.{each.key}": [each.kind, *each.options, dict(each.when), each.points] for each in self.space
        }
        how = ("objectives", "constraints", "sampler", "pruner", "seeds", "grace", "reduction", "startup")
        return {**config, **space, **{f"sweep.{key}": dict(self.options)[key] for key in how}}

    def sampler(self, number: int) -> BaseSampler:
        """Return the sampler of one trial.

        Its seed is a function of the trial's number, so a random search that is killed continues with the same points.
        """
        seed = fold(self.base.values["seed"], "sweep", number) % 2**32
        startup = self.options["startup"]
        makers: dict[str, Callable[..., BaseSampler]] = {
            "random": RandomSampler,
            "grid": RandomSampler,  # its points are given
            "tpe": partial(TPESampler, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True),
            "cmaes": partial(CmaEsSampler, n_startup_trials=max(1, startup), warn_independent_sampling=False),
            "nsga2": partial(NSGAIISampler, population_size=max(2, startup)),
        }
        with experimental():
            return makers[self.options["sampler"]](seed=seed)

    def pruner(self) -> BasePruner:
        """Return the pruner; its resource is the number of evaluations."""
        grace, reduction = self.options["grace"], self.options["reduction"]
        if self.options["pruner"] == "median":
            return MedianPruner(n_startup_trials=self.options["startup"], n_warmup_steps=grace)
        if self.options["pruner"] == "asha":
            return SuccessiveHalvingPruner(min_resource=grace, reduction_factor=reduction)
        if self.options["pruner"] == "hyperband":
            most = max(grace, self.base.values["trainer"]["max_epochs"] or 100)
            return HyperbandPruner(min_resource=grace, max_resource=most, reduction_factor=reduction)
        return NopPruner()

    def arguments(self, point: Mapping[str, Any]) -> list[str]:
        """Return the overrides of a trial: those of all trials, then its sampled values."""
        return [*self.given, *overrides(point, dict(leaves(self.base.values)))]

    def run_folder(self, number: int, seed_index: int) -> Path:
        """Return the run folder of one training of a trial."""
        suffix = f"-seed-{seed_index}" if self.options["seeds"] > 1 else ""
        return self.folder / f"trial-{number:04}{suffix}"


def read_plan(config: Config[SweepConfig]) -> Plan:
    """Return the plan of a composed config. Raises ConfigError before any trial starts."""
    options = config.values["sweep"]
    if config.job is not None:
        raise ConfigError("--multirun", "a sweep starts its trials itself; set sweep.trials and sweep.space instead")
    for name in ("resume", "run_dir"):
        if config.values[name] is not None:
            raise ConfigError(
                name, "cannot be set in a sweep: its folder is sweep.dir, and the same command continues it"
            )
    given = [item for item in config.overrides if not item.lstrip("+~").startswith("sweep.")]
    space = read_space(options["space"])
    objectives = [_objective(text) for text in options["objectives"]]
    if not objectives:
        raise ConfigError("sweep.objectives", "must name at least one, such as max val/accuracy", value=[])
    if len(objectives) > 1 and options["pruner"] != "none":
        explanation = (
            f"cannot prune for {len(objectives)} objectives: which of two trials is worse is undefined; use none"
        )
        raise ConfigError("sweep.pruner", explanation, value=options["pruner"])
    if len(objectives) > 1 and options["sampler"] == "cmaes":
        raise ConfigError("sweep.sampler", "optimises one objective; use nsga2, tpe or random", value="cmaes")
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
    if monitor is not None:  # the best checkpoint is chosen by the objective; overrides of the user come later and win
        given.insert(0, f"trainer.checkpoint.monitor={monitor}")
    if config.values["trainer"]["threads"] is None:
        share = max(1, len(os.sched_getaffinity(0)) // options["parallel"])
        given.insert(0, f"trainer.threads={share}")
    name = options["name"] or config.values["choices"].get("sweep", "sweep")
    plan = Plan(
        options=options,
        folder=Path(options["dir"] or f"outputs/sweep-{name}"),
        space=space,
        objectives=objectives,
        constraints=[_constraint(text) for text in options["constraints"]],
        base=compose_trial(given, config.config_dirs),
        given=given,
        config_dirs=config.config_dirs,
        points=points,
    )
    _dry_run(plan)
    return plan


def _dry_run(plan: Plan) -> None:
    """Compose trials that together contain each option and bound, so that errors are found before the first trial."""
    left = {dimension.key: list(dimension.options) for dimension in plan.space}
    while any(left.values()):
        point: dict[str, Any] = {}
        wanted = next(dimension for dimension in reversed(plan.space) if left[dimension.key])
        calls = {key: values[0] for key, values in wanted.when}
        for dimension in plan.space:
            if dimension.key in calls:
                point[dimension.key] = calls[dimension.key]
            elif dimension.is_used(point) or dimension is wanted:
                point[dimension.key] = (left[dimension.key] or dimension.options)[0]
            if point.get(dimension.key) in left[dimension.key]:
                left[dimension.key].remove(point[dimension.key])
        compose_trial(plan.arguments(point), plan.config_dirs)


def _objective(text: str) -> tuple[str, str]:
    match = OBJECTIVE.match(text)
    assert match is not None  # the schema checks it
    _check_metric(match[2], "sweep.objectives")
    return {"max": "maximize", "min": "minimize"}[match[1]], match[2]


def _constraint(text: str) -> Constraint:
    match = CONSTRAINT.match(text)
    assert match is not None
    _check_metric(match[1], "sweep.constraints")
    return Constraint(match[1], match[2], float(match[3]))


def _check_metric(name: str, key: str) -> None:
    if name not in MEASURED:
        raise ConfigError(key, f"must be one of {', '.join(MEASURED)}; {suggest(name, MEASURED)}", value=name)
