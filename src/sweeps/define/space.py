"""The search space of a sweep, from the config section `sweep.space`.

    optimizer:
      lr: {log_uniform: [0.001, 1]}               log(lr) is uniform
      momentum: {one_minus_log: [0.5, 0.999]}     log(1 - momentum) is uniform: 0.9-0.99 is as likely as 0.99-0.999
      betas: {1: {one_minus_log: [0.9, 0.9999]}}  one item of a list, by its index
    augment: {choice: [none, affine]}             options of a group, or any values
    model:
      choice: [mlp, lenet5]
      hidden: {choice: [[64], [128, 64]], when: {model: mlp}}   used only if `model` is mlp

A dimension is a key of train.yaml and a kind with its options. The other kinds are `uniform`, `int` and `log_int`. In a
grid, each dimension whose kind is neither `choice` nor `int` also needs `points: N`.

Source of the scales: Bergstra & Bengio 2012, Random Search for Hyper-Parameter Optimization, section 2.4. A momentum is
sampled as one minus its value, because a moving average with decay d averages over about 1 / (1 - d) steps.
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
    """A key of the config and the values that the search samples for it."""

    key: str  # as on the command line: optimizer.lr
    kind: str
    options: tuple[Any, ...]  # the values of a choice; (low, high) for all other kinds
    # The condition: (key of another dimension, its allowed values). The dimension is used only if all of them hold.
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    points: int | None = None  # number of values in a grid

    @property
    def name(self) -> str:
        """The name of the sampled value, in the study and in plots."""
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

    def definition(self) -> list[Any]:
        """Return kind, options, condition and points, which the store compares."""
        return [self.kind, *self.options, dict(self.when), self.points]

    def value(self, drawn: Any) -> Any:
        """Return the config value of a sampled value."""
        if self.kind == "choice":
            return self.options[self.labels.index(drawn)]
        return 1 - drawn if self.kind == "one_minus_log" else drawn

    def is_used(self, values: Mapping[str, Any]) -> bool:
        """Return whether the condition `when` holds. `values` are the config values of the preceding dimensions."""
        return all(key in values and values[key] in allowed for key, allowed in self.when)

    def grid(self) -> list[Any]:
        """Return the sampled values of a grid: all labels of a choice, else `points` values.

        They are evenly spaced on the dimension's scale, and rounded for integers. Without `points`, an `int` dimension
        has all its integers; all other kinds raise ConfigError.
        """
        if self.kind == "choice":
            return self.labels
        distribution = self.distribution
        assert isinstance(distribution, IntDistribution | FloatDistribution)
        low, high = distribution.low, distribution.high
        if self.points is None:
            if self.kind != "int":
                raise ConfigError(f"sweep.space.{self.key}", f"a grid needs `points: N` in addition to {self.kind}")
            return list(range(int(low), int(high) + 1))
        shares = [index / max(1, self.points - 1) for index in range(self.points)]
        if distribution.log:
            values = [math.exp(math.log(low) + share * (math.log(high) - math.log(low))) for share in shares]
            values = [min(max(value, low), high) for value in values]  # rounding errors could exceed the bounds
        else:
            values = [low + share * (high - low) for share in shares]
        return sorted({round(value) for value in values}) if isinstance(distribution, IntDistribution) else values


def read_space(tree: Mapping[str, Any]) -> list[Dimension]:
    """Return the dimensions of the config section `sweep.space`.

    A dimension comes after all dimensions in its condition `when`. Raises ConfigError for an invalid space.
    """
    dimensions = list(_dimensions(tree, ""))
    if not dimensions:
        raise ConfigError("sweep.space", "is empty; see configs/sweep/random.yaml for an example")
    keys = [dimension.key for dimension in dimensions]
    for dimension in dimensions:
        for key, _ in dimension.when:
            if key not in keys:
                hint = suggest(key, keys) or f"the dimensions are {', '.join(keys)}"
                raise ConfigError(f"sweep.space.{dimension.key}.when", f"is not a dimension; {hint}", value=key)
    ordered: list[Dimension] = []
    remaining = dimensions
    while remaining:
        ordered_keys = {dimension.key for dimension in ordered}
        ready = [dimension for dimension in remaining if {key for key, _ in dimension.when} <= ordered_keys]
        if not ready:
            raise ConfigError(
                f"sweep.space.{remaining[0].key}.when",
                "must not depend on this dimension itself, directly or through others",
            )
        ordered += ready
        remaining = [dimension for dimension in remaining if dimension not in ready]
    return ordered


def _dimensions(tree: Mapping[str, Any], prefix: str) -> Iterator[Dimension]:
    """Yield the dimensions of a section; `prefix` is its dotted name with a final dot. A key may also have sub-keys."""
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
    """Return the dimension of a key, after checking its options. Raises ConfigError."""
    subject, options = f"sweep.space.{key}.{kind}", node[kind]
    if kind == "choice":
        labels = [_label(option) for option in options] if isinstance(options, list) else []
        if not labels or len(set(map(repr, labels))) < len(labels):
            raise ConfigError(subject, "must be a list of different values", value=options)
    else:
        is_integer = kind in ("int", "log_int")
        are_numbers = isinstance(options, list) and all(
            type(bound) is int or (type(bound) is float and not is_integer and math.isfinite(bound))
            for bound in options
        )
        if not are_numbers or len(options) != 2 or options[0] > options[1]:
            raise ConfigError(
                subject, f"must be [low, high], two {'integers' if is_integer else 'numbers'}", value=options
            )
        if kind in ("log_uniform", "log_int") and options[0] <= 0:
            raise ConfigError(subject, "must be > 0, because its logarithm is sampled", value=options)
        if kind == "one_minus_log" and options[1] >= 1:
            raise ConfigError(subject, "must be < 1, because the logarithm of 1 - value is sampled", value=options)
    points = node.get("points")
    if points is not None and (type(points) is not int or points < 1 or kind == "choice"):
        raise ConfigError(
            f"sweep.space.{key}.points", "must be an integer >= 1; a choice has no `points`", value=points
        )
    when = node.get("when", {})
    if not isinstance(when, dict):
        raise ConfigError(f"sweep.space.{key}.when", "must be {KEY: value or [values]} of other dimensions", value=when)
    conditions = tuple(
        (name, tuple(values) if isinstance(values, list) else (values,)) for name, values in when.items()
    )
    return Dimension(key, kind, tuple(options), conditions, points)


def _kinds() -> str:
    return f"the kinds are {', '.join(KINDS)}"


def _label(option: Any) -> Any:
    """Return an option as Optuna stores it; Optuna's categories cannot be lists or dicts, so they become JSON."""
    return option if option is None or isinstance(option, bool | int | float | str) else json.dumps(option)


def draw(space: list[Dimension], trial: BaseTrial) -> dict[str, Any]:
    """Sample a point of the space, and return its config values by key. Unused dimensions are left out."""
    values: dict[str, Any] = {}
    for dimension in space:
        if dimension.is_used(values):
            # Unlike `suggest_float` and its siblings, `_suggest` accepts any distribution.
            drawn = trial._suggest(dimension.name, dimension.distribution)  # type: ignore[attr-defined]
            values[dimension.key] = dimension.value(drawn)
    return values


def point(space: list[Dimension], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config values by key of a trial's stored parameters."""
    return {dimension.key: dimension.value(params[dimension.name]) for dimension in space if dimension.name in params}


def grid(space: list[Dimension]) -> list[dict[str, Any]]:
    """Return all points of a grid as parameters of the study, {name: sampled value}, without duplicates.

    The first dimension changes slowest. Raises ConfigError if a dimension has no number of points.
    """
    points: list[dict[str, Any]] = []
    for combination in itertools.product(*(dimension.grid() for dimension in space)):
        values: dict[str, Any] = {}
        params: dict[str, Any] = {}
        for dimension, drawn in zip(space, combination):
            if dimension.is_used(values):
                values[dimension.key], params[dimension.name] = dimension.value(drawn), drawn
        points.append(params)
    # Combinations that differ only in unused dimensions are the same point.
    return [params for index, params in enumerate(points) if params not in points[:index]]


def overrides(values: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Return a point as overrides of the command line.

    values:  the config values of the point, by key
    base:    the values of the config without the point, by key. The items of a list that the point does not set are
             taken from it.
    """
    joined: dict[str, Any] = {}
    for key, value in values.items():
        parent, _, last = key.rpartition(".")
        if last.isdigit() and isinstance(base.get(parent), list):
            items = joined.setdefault(parent, list(base[parent]))
            items[int(last)] = value
        else:
            joined[key] = value
    return [f"{key}={written(value)}" for key, value in joined.items()]
