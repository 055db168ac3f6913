"""Tables of the keys that each script's config may hold, and the check that applies them; no torch.

A section that names a `_target_` also holds the arguments of that class. The builder checks those against the class's
signature.
"""

import re
from collections.abc import Mapping
from typing import Any

from core.config import CONFIGS, leaves
from core.errors import ConfigError, suggest
from core.rules import (
    Rule,
    duration,
    either,
    flag,
    like,
    list_of,
    number,
    one_of,
    optional,
    section,
    switched_off_by,
    text,
    whole,
)

SPLITS = ("train", "val", "test")
METRIC = one_of(*(f"{split}/{name}" for split in ("train", "val") for name in ("loss", "accuracy")))
MODE = one_of("auto", "min", "max")
NAMED = ("model", "data", "optimizer", "schedule", "loss")  # sections that hold the arguments of their `_target_`

TRAIN: dict[str, Rule] = {
    "seed": whole(0),
    "run_dir": optional(text),
    "resume": optional(text),
    "init_from": optional(text),
    "trust": list_of(text),
    "traceback": flag,
    "choices": section,
    **dict.fromkeys(("model", "data", "augment", "optimizer", "schedule", "loss", "trainer"), section),
    **{f"{name}._target_": text for name in NAMED},
    "data.root": optional(text),
    "data.download": flag,
    "data.batch_size": whole(1),
    "data.eval_batch_size": whole(1),
    "data.num_workers": whole(0),
    "data.val_fraction": number(0, 1, without="high"),
    "data.test_fraction": number(0, 1, without="high"),
    "data.image_size": whole(1, 2**14),
    "data.stored_size": optional(whole(1, 2**14)),
    "data.channels": one_of(1, 3),
    "data.num_classes": optional(whole(2)),
    "data.fit": one_of("resize", "pad"),
    "data.limit_train": optional(whole(1)),
    "data.limit_eval": optional(whole(1)),
    "data.drop_last": one_of("auto", True, False),
    "data.memory_budget": number(0),
    "data.normalise": one_of("none", "per_channel", "pca", "zca"),
    "data.whitening_epsilon": number(0, without="low"),
    "data.on_bad_image": one_of("error", "skip"),
    "data.max_pixels": whole(1),
    "data.cache_dir": optional(text),
    "data.timeout_s": number(0, without="low"),
    "model.num_classes": optional(whole(2)),
    "model.in_channels": whole(1),
    "optimizer.lr": number(0, without="low"),
    "optimizer.momentum": number(0, 1, without="high"),
    "optimizer.betas": list_of(number(0, 1, without="high"), length=2),
    "optimizer.eps": number(0, without="low"),
    "optimizer.weight_decay": number(0),
    "optimizer.nesterov": flag,
    "optimizer.alpha": number(0, 1, without="high"),
    "optimizer.centered": flag,
    "optimizer.lr_decay": number(0),
    "optimizer.initial_accumulator_value": number(0),
    "optimizer.adamw_lr": optional(number(0, without="low")),
    "schedule.warmup_epochs": number(0, 1e6),
    "schedule.momentum": optional(list_of(number(0, 1, without="low high"), length=2)),
    "schedule.rise": number(0, 1, without="low high"),
    "schedule.every": number(0, 1, without="low"),
    "schedule.final": number(0, 1),
    "schedule.decay": number(0),
    "schedule.power": number(0, without="low"),
    "schedule.periods": whole(1, 100),
    "schedule.multiplier": number(1, 1000),
    "schedule.start_divisor": number(1),
    "schedule.final_divisor": number(1),
    "schedule.interval": one_of("epoch", "step"),
    "schedule.monitor": METRIC,
    "schedule.mode": MODE,
    "loss.auxiliary_weight": optional(number(0)),
    "loss.delta": number(0, 1, without="low"),
    "loss.label_smoothing": number(0, 1, without="high"),
    "loss.class_weights": optional(either(one_of("balanced"), list_of(number(0, without="low")))),
    "trainer.max_epochs": optional(whole(1)),
    "trainer.max_steps": optional(whole(1)),
    "trainer.max_minutes": optional(number(0, without="low")),
    "trainer.device": one_of("auto", "cpu", "cuda"),
    "trainer.threads": optional(whole(1, 4096)),
    "trainer.precision": one_of("fp32", "bf16", "fp16"),
    "trainer.tf32": one_of("auto", True, False),
    "trainer.compile": flag,
    "trainer.channels_last": one_of("auto", True, False),
    "trainer.deterministic": flag,
    "trainer.accumulate": whole(1),
    "trainer.clip_norm": optional(number(0, without="low")),
    "trainer.l1": number(0),
    "trainer.ema_decay": optional(number(0, 1, without="low high")),
    "trainer.on_nonfinite": one_of("stop", "skip"),
    "trainer.weight_decay_on": one_of("all", "weights"),
    "trainer.bias_lr_factor": number(0, without="low"),
    "trainer.tta": one_of("none", "mirror"),
    "trainer.evaluate_every": duration,
    "trainer.log_every": duration,
    "trainer.histograms_every": optional(duration),
    "trainer.log_graph": flag,
    "trainer.log_images": flag,
    "trainer.early_stopping": switched_off_by("trainer.early_stopping.patience=null"),
    "trainer.early_stopping.monitor": METRIC,
    "trainer.early_stopping.mode": MODE,
    "trainer.early_stopping.patience": optional(whole(1)),
    "trainer.early_stopping.min_delta": number(0),
    "trainer.early_stopping.geometric": optional(number(1, without="low")),
    "trainer.checkpoint": section,
    "trainer.checkpoint.every_steps": optional(whole(1)),
    "trainer.checkpoint.keep": optional(whole(1)),
    "trainer.checkpoint.monitor": optional(METRIC),
    "trainer.checkpoint.mode": MODE,
}
OBJECTIVE = re.compile(r"^(max|min) (\S+)$")
CONSTRAINT = re.compile(r"^(\S+) (<=|>=|<|>) ([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)$")
SWEEP: dict[str, Rule] = {
    **TRAIN,
    "sweep": section,
    "sweep.dir": optional(text),
    "sweep.name": optional(text),
    "sweep.storage": optional(text),
    "sweep.trials": optional(whole(1)),
    "sweep.parallel": whole(1, 1000),
    "sweep.seeds": whole(1, 1000),
    "sweep.minutes": optional(number(0, without="low")),
    "sweep.objectives": list_of(like(OBJECTIVE, "max METRIC or min METRIC")),
    "sweep.constraints": list_of(like(CONSTRAINT, "METRIC < NUMBER, or with >, <= or >=")),
    "sweep.sampler": one_of("random", "grid", "tpe", "cmaes", "nsga2"),
    "sweep.startup": whole(0),
    "sweep.pruner": one_of("none", "median", "asha", "hyperband"),
    "sweep.grace": whole(1),
    "sweep.reduction": whole(2, 100),
    "sweep.retries": whole(0, 100),
    "sweep.on_error": one_of("continue", "stop"),
    "sweep.warm": flag,
    "sweep.stale_after": whole(10),
    "sweep.space": section,
}
RUN = {"run": text, "trust": list_of(text), "traceback": flag, "device": one_of("auto", "cpu", "cuda")}
EVALUATE: dict[str, Rule] = {
    **RUN,
    "split": one_of(*SPLITS),
    "checkpoint": one_of("best", "last"),
    "root": optional(text),
}
PREDICT: dict[str, Rule] = {
    **RUN,
    "input": text,
    "output": text,
    "checkpoint": one_of("best", "last"),
    "batch_size": whole(1),
}
RUNS: dict[str, Rule] = {
    "folder": text,
    "sort": text,
    "output": optional(text),
    "curves": optional(text),
    "traceback": flag,
}

# Of the keys in these sections, those that are read beside the arguments of what `_target_` names.
REQUIRED = (
    *(f"{section}._target_" for section in NAMED),
    *("data.batch_size", "data.eval_batch_size", "data.num_workers", "data.val_fraction", "data.image_size"),
    *("data.channels", "data.num_classes", "data.fit", "data.limit_train", "data.drop_last", "data.memory_budget"),
    "data.timeout_s",
)

# Free on resume too, as long as their product stays: what did not fit into memory may continue in smaller batches.
BATCHES = ("data.batch_size", "trainer.accumulate")

# What a resumed run may change: how long and where it runs, what it logs, and what a user who watches it may turn: the
# base rate, which scales the whole schedule from the next step on, weight decay, momentum, clipping, and what is done
# about a step that is not finite.
FREE_ON_RESUME = (
    *("trainer.max_epochs", "trainer.max_steps", "trainer.max_minutes", "trainer.device", "trainer.threads"),
    *("trainer.log_every", "trainer.histograms_every", "trainer.log_graph", "trainer.log_images"),
    *("trainer.checkpoint.every_steps", "trainer.checkpoint.keep", "trainer.clip_norm", "trainer.on_nonfinite"),
    *(
        "optimizer.lr",
        "optimizer.adamw_lr",
        "optimizer.weight_decay",
        "optimizer.momentum",
        "data.num_workers",
        "data.timeout_s",
        "data.on_bad_image",
        "data.cache_dir",
        "data.root",
        "data.download",
    ),
)


def check(config: dict[str, Any], rules: Mapping[str, Rule], *, shown: dict[str, Any]) -> None:
    """Raise ConfigError for the first key that no rule knows, or whose value its rule refuses.

    `shown` is the same config as errors may tell it: without values from the environment.
    """
    spelled = dict(leaves(shown))
    closed = {name.rpartition(".")[0] for name, rule in rules.items()} - {
        # Sections with a `_target_` take that class's arguments too.
        *(name for name, value in leaves(config) if isinstance(value, dict) and "_target_" in value),
        *NAMED,
        "augment",
    }
    for name, value in leaves(config):
        parent = name.rpartition(".")[0]
        rule = rules.get(name)
        if rule is None and parent in closed:
            siblings = [known for known in rules if known.rpartition(".")[0] == parent]
            hint = suggest(name, siblings) or f"known here: {', '.join(siblings)}"
            if (CONFIGS / name).is_dir() and isinstance(value, Mapping):
                hint = "a file whose keys are those of the whole config starts with the line # @package _global_"
            raise ConfigError(name, f"unknown key; {hint}", value=spelled[name])
        if rule is not None and (allowed := rule(value)):
            raise ConfigError(name, allowed, value=spelled[name])
    for name in rules:  # a required key that someone's own file leaves out
        parent, _, key = name.rpartition(".")
        if (parent == "" or parent in closed or name in REQUIRED) and key not in dict(_descend(config, parent)):
            raise ConfigError(name, "missing; see the comment beside this key in configs/")


def _descend(config: Mapping[str, Any], dotted: str) -> Mapping[str, Any]:
    for key in filter(None, dotted.split(".")):
        config = config[key]
    return config
