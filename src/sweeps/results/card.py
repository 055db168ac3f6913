"""Experiment cards: the config of a trial as a YAML file, SWEEP/experiment/NAME.yaml, for `experiment=NAME`."""

import shlex
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
# Keys whose values depend on the machine or the sweep, and do not belong to the recipe of a training.
OMITTED_KEYS = ("run_dir", "resume", "traceback", "trust", "trainer.threads", "trainer.log_graph", "trainer.log_images")


def write_card(plan: Plan, trial: FrozenTrial, name: str) -> None:
    """Write SWEEP/experiment/NAME.yaml, from which train.py composes the config of a trial.

    The card selects an option of each group in GROUPS, and contains every value that differs from these options.
    """
    config = compose_trial(plan.arguments(point(plan.space, trial.params)), plan.config_dirs)
    chosen = {group: config.values["choices"][group] for group in GROUPS if group in config.values["choices"]}
    start = [f"{group}={written(option)}" for group, option in chosen.items()]
    # The values of `data` are compared first. Others, such as model.num_classes, are interpolated from them, so they no
    # longer differ and are not written.
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
        f"# Trial {trial.number} of the sweep {plan.name}: {metrics} (seeds: {trial.user_attrs['seeds']}).",
        f"#   command   {command(plan, name)}",
        "",
        "defaults:",
        *(f"  - override /{group}: {option}" for group, option in chosen.items()),
        "",
        yaml.safe_dump(card, sort_keys=False) if card else "",
    ]
    write_durably(path, "\n".join(lines).encode(errors="surrogateescape"))


def _differing(plan: Plan, config: Config[TrainConfig], arguments: list[str]) -> list[tuple[str, Any]]:
    """Return the keys and values of a trial's config that differ from what train.py composes from `arguments`."""
    composed = compose_config("train", arguments, TrainConfig, folders=list(map(Path, plan.config_dirs)), missing=None)
    composed_values = dict(leaves(composed.record))
    return [
        (key, value)
        for key, value in leaves(config.record)
        if not (key.partition(".")[0] == "choices" or key in OMITTED_KEYS or (isinstance(value, dict) and value))
        and (key not in composed_values or composed_values[key] != value)
    ]


def command(plan: Plan, name: str) -> str:
    """Return the shell command that trains with the card NAME. Its arguments are quoted, so it can be pasted."""
    arguments = [f"--config-dir={plan.folder}", f"experiment={name}", *search_path(plan.config_dirs)]
    return shlex.join(["python", "scripts/train.py", *arguments])
