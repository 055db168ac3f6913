"""Experiment cards: a trial as a YAML file that `train.py` runs."""

from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial

from core.composition import compose_config
from core.config import Config, leaves
from core.durable import write_durably
from core.options.declarations import TrainConfig
from sweeps.define.compose import compose_trial, search_path, written
from sweeps.define.plan import Plan
from sweeps.define.space import point
from sweeps.results.ranking import spread

GROUPS = ("model", "data", "augment", "optimizer", "schedule", "loss")
# Keys that belong to this machine or sweep, not to the recipe.
LEFT_OUT = ("run_dir", "resume", "traceback", "trust", "trainer.threads", "trainer.log_graph", "trainer.log_images")


def write_card(plan: Plan, trial: FrozenTrial, name: str) -> None:
    """Write SWEEP/experiment/NAME.yaml: the option of each group, and all values that differ from these options."""
    config = compose_trial(plan.arguments(point(plan.space, trial.params)), plan.config_dirs)
    chosen = {group: config.values["choices"][group] for group in GROUPS if group in config.values["choices"]}
    start = [f"{group}={written(option)}" for group, option in chosen.items()]
    # The values of the data come first: others, such as model.num_classes, follow from them and are then left out.
    data = [(key, value) for key, value in _differing(plan, config, start) if key.startswith("data.")]
    rest = _differing(plan, config, [*start, *(f"{key}={written(value)}" for key, value in data)])
    card: dict[str, Any] = {}
    for key, value in [*data, *rest]:
        node = card
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    path = plan.folder / "experiment" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    metrics = ", ".join(f"{metric} {spread(trial, metric)}" for _, metric in plan.objectives)
    lines = [
        "# @package _global_",
        f"# Trial {trial.number} of the sweep {plan.name}: {metrics} (validation, seeds: {trial.user_attrs['seeds']}).",
        f"# {command(plan, name)}",
        "",
        "defaults:",
        *(f"  - override /{group}: {option}" for group, option in chosen.items()),
        "",
        yaml.safe_dump(card, sort_keys=False) if card else "",
    ]
    write_durably(path, "\n".join(lines).encode())


def _differing(plan: Plan, config: Config[TrainConfig], arguments: list[str]) -> list[tuple[str, Any]]:
    """Return the values of a trial's config that train.py would not compose from these overrides alone."""
    composed = compose_config("train", arguments, TrainConfig, folders=list(map(Path, plan.config_dirs)), missing=None)
    before = dict(leaves(composed.record))
    return [
        (key, value)
        for key, value in leaves(config.record)
        if not (key.partition(".")[0] == "choices" or key in LEFT_OUT or (isinstance(value, dict) and value))
        and (key not in before or before[key] != value)
    ]


def command(plan: Plan, name: str) -> str:
    """Return the command that trains a card."""
    paths = "".join(f" '{path}'" for path in search_path(plan.config_dirs))
    return f"python scripts/train.py --config-dir={plan.folder} experiment={name}{paths}"
