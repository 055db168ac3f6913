"""The search space: what a sweep may change, as `sweep.space` in YAML says it.

    optimizer:
      lr: {log_uniform: [0.001, 1]}               log lr is uniform
      momentum: {one_minus_log: [0.5, 0.999]}     log (1 - momentum) is: 0.9 to 0.99 weighs as much as 0.99 to 0.999
      betas: {1: {one_minus_log: [0.9, 0.9999]}}  one number of a list, by its place
    augment: {choice: [none, affine]}             a group's options, or any values
    model:
      choice: [mlp, lenet5]
      hidden: {choice: [[64], [128, 64]], when: {model: mlp}}   only where that was drawn

A dimension is a key of train.yaml; `log_int`, `int` and `uniform` are the other kinds. A grid also takes `points: N`.

Source of the scales: Bergstra & Bengio 2012, Random Search for Hyper-Parameter Optimization, section 2.4; one minus the
decay of an average is the inverse of the number of steps that it remembers.
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
    """One key that is searched over."""

    key: str  # as on the command line: optimizer.lr
    kind: str
    options: tuple[Any, ...]  # of a choice; the bounds of all others
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # other dimensions' keys and the values that call for this one
    points: int | None = None  # of a grid

    @property
    def name(self) -> str:
        """What the study and its plots call it: what is uniform is what is drawn."""
        return f"1 - {self.key}" if self.kind == "one_minus_log" else self.key

    @property
    def labels(self) -> list[Any]:
        """The options of a choice as the study knows them: a list by its JSON."""
        return [_label(option) for option in self.options]

    @property
    def distribution(self) -> BaseDistribution:
        """Optuna's."""
        if self.kind == "choice":
            return CategoricalDistribution(self.labels)
        low, high = self.options
        if self.kind in ("int", "log_int"):
            return IntDistribution(low, high, log=self.kind == "log_int")
        if self.kind == "one_minus_log":
            low, high = 1 - high, 1 - low
        return FloatDistribution(low, high, log=self.kind != "uniform")

    def value(self, drawn: Any) -> Any:
        """The config's value for what was drawn."""
        if self.kind == "choice":
            return self.options[self.labels.index(drawn)]
        return 1 - drawn if self.kind == "one_minus_log" else drawn

    def is_called_for(self, values: Mapping[str, Any]) -> bool:
        """Do the values drawn so far ask for this dimension?"""
        return all(key in values and values[key] in wanted for key, wanted in self.when)

    def grid(self) -> list[Any]:
        """The values drawn by a grid, evenly spaced on the dimension's own scale."""
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
    """The dimensions, each behind those that its condition names; ConfigError for what cannot be drawn from."""
    found = list(_dimensions(tree, ""))
    if not found:
        raise ConfigError("sweep.space", "empty: say what to search over, as in configs/sweep/random.yaml")
    keys = [dimension.key for dimension in found]
    ordered: list[Dimension] = []
    for dimension in found:
        for key, _ in dimension.when:
            if key not in keys:
                hint = suggest(key, keys) or f"there are {', '.join(keys)}"
                raise ConfigError(f"sweep.space.{dimension.key}.when", f"names no dimension; {hint}", value=key)
    while found:
        ready = [each for each in found if {key for key, _ in each.when} <= {done.key for done in ordered}]
        if not ready:
            raise ConfigError(f"sweep.space.{found[0].key}.when", "waits for itself, by way of others")
        ordered += ready
        found = [each for each in found if each not in ready]
    return ordered


def _dimensions(tree: Mapping[str, Any], prefix: str) -> Iterator[Dimension]:
    for name, node in tree.items():
        key = f"{prefix}{name}"
        place = f"sweep.space.{key}"
        if not isinstance(node, dict):
            raise ConfigError(
                place, f"must be a dimension, such as {{log_uniform: [0.001, 1]}}; {_kinds()}", value=node
            )
        kinds = [kind for kind in KINDS if kind in node]
        children = {child: value for child, value in node.items() if child not in (*KINDS, "when", "points")}
        if len(kinds) > 1:
            raise ConfigError(place, f"is two kinds at once, {' and '.join(kinds)}")
        if kinds:
            yield _dimension(key, kinds[0], node)
        elif not children or "when" in node or "points" in node:
            raise ConfigError(place, f"has no kind; {_kinds()}")
        yield from _dimensions(children, f"{key}.")


def _dimension(key: str, kind: str, node: Mapping[str, Any]) -> Dimension:
    place, options = f"sweep.space.{key}.{kind}", node[kind]
    if kind == "choice":
        labels = [_label(option) for option in options] if isinstance(options, list) else []
        if not labels or len(set(map(repr, labels))) < len(labels):
            raise ConfigError(place, "must be a list of different values", value=options)
    else:
        whole = kind in ("int", "log_int")
        numbers = isinstance(options, list) and all(
            type(bound) is int or (type(bound) is float and not whole and math.isfinite(bound)) for bound in options
        )
        if not numbers or len(options) != 2 or options[0] > options[1]:
            raise ConfigError(place, f"must be [low, high], {'integers' if whole else 'numbers'}", value=options)
        if kind in ("log_uniform", "log_int") and options[0] <= 0:
            raise ConfigError(place, "must be > 0, as its logarithm is drawn", value=options)
        if kind == "one_minus_log" and options[1] >= 1:
            raise ConfigError(place, "must be < 1, as the logarithm of 1 - value is drawn", value=options)
    points = node.get("points")
    if points is not None and (type(points) is not int or points < 1 or kind == "choice"):
        raise ConfigError(f"sweep.space.{key}.points", "must be an integer >= 1, beside two bounds", value=points)
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
    """A point of the space, by key; dimensions that are not called for have none."""
    values: dict[str, Any] = {}
    for dimension in space:
        if dimension.is_called_for(values):
            drawn = trial._suggest(dimension.name, dimension.distribution)  # type: ignore[attr-defined]
            values[dimension.key] = dimension.value(drawn)
    return values


def point(space: list[Dimension], params: Mapping[str, Any]) -> dict[str, Any]:
    """The config's values of what a study has noted."""
    return {each.key: each.value(params[each.name]) for each in space if each.name in params}


def grid(space: list[Dimension]) -> list[dict[str, Any]]:
    """Every point of a grid, as the study notes it; the first dimension changes slowest."""
    points: list[dict[str, Any]] = []
    for drawn in itertools.product(*(dimension.grid() for dimension in space)):
        values: dict[str, Any] = {}
        found: dict[str, Any] = {}
        for dimension, each in zip(space, drawn):
            if dimension.is_called_for(values):
                values[dimension.key], found[dimension.name] = dimension.value(each), each
        points.append(found)
    return [found for index, found in enumerate(points) if found not in points[:index]]


def overrides(values: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """A point as overrides of the command line; numbers of a list join the others in `base`, the config's leaves."""
    joined: dict[str, Any] = {}
    for key, value in values.items():
        parent, _, last = key.rpartition(".")
        if last.isdigit() and isinstance(base.get(parent), list):
            items = joined.setdefault(parent, list(base[parent]))
            items[int(last)] = value
        else:
            joined[key] = value
    return [f"{key}={written(value)}" for key, value in joined.items()]
