"""The search space of a sweep, from the config section `sweep.space`.

    optimizer:
      lr: {log_uniform: [0.001, 1]}               log lr is uniform
      momentum: {one_minus_log: [0.5, 0.999]}     log (1 - momentum) is uniform: 0.9-0.99 is as likely as 0.99-0.999
      betas: {1: {one_minus_log: [0.9, 0.9999]}}  one item of a list, by its index
    augment: {choice: [none, affine]}             options of a group, or any values
    model:
      choice: [mlp, lenet5]
      hidden: {choice: [[64], [128, 64]], when: {model: mlp}}   only for these models

A dimension is a key of train.yaml. The other kinds are `log_int`, `int` and `uniform`. A grid also needs `points: N`.

Source of the scales: Bergstra & Bengio 2012, Random Search for Hyper-Parameter Optimization, section 2.4; one minus the
decay of a moving average is the inverse of the number of steps that it averages over.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

from core.errors import ConfigError, suggest
from sweeps.define.compose import written

KINDS = ("choice", "uniform", "log_uniform", "one_minus_log", "int", "log_int")


@dataclass(frozen=True)
class Dimension:
    """One key of the config, and the values that the search may give it."""

    key: str  # as on the command line: optimizer.lr
    kind: str
    options: tuple[Any, ...]  # the values of a choice; [low, high] of all other kinds
    when: tuple[
        tuple[str, tuple[Any, ...]], ...
    ] = ()  # (key of another dimension, its values with which this one is used)
    points: int | None = None  # number of values in a grid

    @property
    def name(self) -> str:
        """The name in the study and its plots: that of the sampled value."""
        return f"1 - {self.key}" if self.kind == "one_minus_log" else self.key

    @property
    def labels(self) -> list[Any]:
        """The options of a choice as the study stores them: lists as JSON."""
        return [_label(option) for option in self.options]

    @property
    def distribution(self) -> BaseDistribution:
        """The distribution that Optuna samples from."""
        if self.kind == "choice":
            return CategoricalDistribution(self.labels)
        low, high = self.options
        if self.kind in ("int", "log_int"):
            return IntDistribution(low, high, log=self.kind == "log_int")
        if self.kind == "one_minus_log":
            low, high = 1 - high, 1 - low
        return FloatDistribution(low, high, log=self.kind != "uniform")

    def value(self, drawn: Any) -> Any:
        """Return the value for the config, for a sampled value."""
        if self.kind == "choice":
            return self.options[self.labels.index(drawn)]
        return 1 - drawn if self.kind == "one_minus_log" else drawn

    def is_used(self, values: Mapping[str, Any]) -> bool:
        """Return whether this dimension is used with the values of the dimensions before it."""
        return all(key in values and values[key] in wanted for key, wanted in self.when)

    def grid(self) -> list[Any]:
        """Return the values of a grid, evenly spaced on the dimension's scale. Raises ConfigError without `points`."""
        if self.kind == "choice":
            return self.labels
        distribution = self.distribution
        assert isinstance(distribution, IntDistribution | FloatDistribution)
        low, high = distribution.low, distribution.high
        if self.points is None:
            if self.kind != "int":
                raise ConfigError(f"sweep.space.{self.key}", f"a grid needs points: N beside {self.kind}, or a choice")
            return list(range(int(low), int(high) + 1))
        shares = [index / max(1, self.points - 1) for index in range(self.points)]
        if distribution.log:
            found = [math.exp(math.log(low) + share * (math.log(high) - math.log(low))) for share in shares]
            found = [min(max(value, low), high) for value in found]
        else:
            found = [low + share * (high - low) for share in shares]
        return sorted({round(value) for value in found}) if isinstance(distribution, IntDistribution) else found


def read_space(tree: Mapping[str, Any]) -> list[Dimension]:
    """Return the dimensions, each after those that its `when` names. Raises ConfigError for an invalid space."""
    found = list(_dimensions(tree, ""))
    if not found:
        raise ConfigError("sweep.space", "is empty; see configs/sweep/random.yaml for an example")
    keys = [dimension.key for dimension in found]
    ordered: list[Dimension] = []
    for dimension in found:
        for key, _ in dimension.when:
            if key not in keys:
                hint = suggest(key, keys) or f"the dimensions are {', '.join(keys)}"
                raise ConfigError(f"sweep.space.{dimension.key}.when", f"is not a dimension; {hint}", value=key)
    while found:
        ready = [each for each in found if {key for key, _ in each.when} <= {done.key for done in ordered}]
        if not ready:
            raise ConfigError(f"sweep.space.{found[0].key}.when", "depends on itself, through other dimensions")
        ordered += ready
        found = [each for each in found if each not in ready]
    return ordered


def _dimensions(tree: Mapping[str, Any], prefix: str) -> Iterator[Dimension]:
    for name, node in tree.items():
        key = f"{prefix}{name}"
        subject = f"sweep.space.{key}"
        if not isinstance(node, dict):
            raise ConfigError(
                subject, f"must be a dimension, such as {{log_uniform: [0.001, 1]}}; {_kinds()}", value=node
            )
        kinds = [kind for kind in KINDS if kind in node]
        children = {child: value for child, value in node.items() if child not in (*KINDS, "when", "points")}
        if len(kinds) > 1:
            raise ConfigError(subject, f"must be of one kind, not {' and '.join(kinds)}")
        if kinds:
            yield _dimension(key, kinds[0], node)
        elif not children or "when" in node or "points" in node:
            raise ConfigError(subject, f"has no kind; {_kinds()}")
        yield from _dimensions(children, f"{key}.")


def _dimension(key: str, kind: str, node: Mapping[str, Any]) -> Dimension:
    subject, options = f"sweep.space.{key}.{kind}", node[kind]
    if kind == "choice":
        labels = [_label(option) for option in options] if isinstance(options, list) else []
        if not labels or len(set(map(repr, labels))) < len(labels):
            raise ConfigError(subject, "must be a list of different values", value=options)
    else:
        is_integer = kind in ("int", "log_int")
        numbers = isinstance(options, list) and all(
            type(bound) is int or (type(bound) is float and not is_integer and math.isfinite(bound))
            for bound in options
        )
        if not numbers or len(options) != 2 or options[0] > options[1]:
            raise ConfigError(subject, f"must be [low, high], {'integers' if is_integer else 'numbers'}", value=options)
        if kind in ("log_uniform", "log_int") and options[0] <= 0:
            raise ConfigError(subject, "must be > 0, as its logarithm is sampled", value=options)
        if kind == "one_minus_log" and options[1] >= 1:
            raise ConfigError(subject, "must be < 1, as the logarithm of 1 - value is sampled", value=options)
    points = node.get("points")
    if points is not None and (type(points) is not int or points < 1 or kind == "choice"):
        raise ConfigError(
            f"sweep.space.{key}.points", "must be an integer >= 1, for a kind with two bounds", value=points
        )
    when = node.get("when", {})
    if not isinstance(when, dict):
        raise ConfigError(f"sweep.space.{key}.when", "must be {KEY: value or [values]} of other dimensions", value=when)
    calls = tuple((name, tuple(wanted) if isinstance(wanted, list) else (wanted,)) for name, wanted in when.items())
    return Dimension(key, kind, tuple(options), calls, points)


def _kinds() -> str:
    return f"the kinds are {', '.join(KINDS)}"


def _label(option: Any) -> Any:
    return option if option is None or isinstance(option, bool | int | float | str) else json.dumps(option)


def draw(space: list[Dimension], trial: BaseTrial) -> dict[str, Any]:
    """Sample a point of the space; return its values by key. Dimensions that are not used have none."""
    values: dict[str, Any] = {}
    for dimension in space:
        if dimension.is_used(values):
            drawn = trial._suggest(dimension.name, dimension.distribution)  # type: ignore[attr-defined]
            values[dimension.key] = dimension.value(drawn)
    return values


def point(space: list[Dimension], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config values of the parameters that a study has stored."""
    return {each.key: each.value(params[each.name]) for each in space if each.name in params}


def grid(space: list[Dimension]) -> list[dict[str, Any]]:
    """Return all points of a grid, as the study stores them; the first dimension changes slowest."""
    points: list[dict[str, Any]] = []
    for drawn in itertools.product(*(dimension.grid() for dimension in space)):
        values: dict[str, Any] = {}
        found: dict[str, Any] = {}
        for dimension, each in zip(space, drawn):
            if dimension.is_used(values):
                values[dimension.key], found[dimension.name] = dimension.value(each), each
        points.append(found)
    return [found for index, found in enumerate(points) if found not in points[:index]]


def overrides(values: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Return a point as overrides. Items of a list are put into the list of `base`, the values of the config by key."""
    joined: dict[str, Any] = {}
    for key, value in values.items():
        parent, _, last = key.rpartition(".")
        if last.isdigit() and isinstance(base.get(parent), list):
            items = joined.setdefault(parent, list(base[parent]))
            items[int(last)] = value
        else:
            joined[key] = value
    return [f"{key}={written(value)}" for key, value in joined.items()]
