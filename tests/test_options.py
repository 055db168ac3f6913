"""Options: each is declared once; validation, help, resume, comparison and overrides follow from the declaration.

The lists below are written by hand, so that they detect a missing mark in a declaration.
"""

import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import built, composed, reopened, run_to_end, stop_after, trained

from core.config import CONFIGS, leaves
from core.errors import CheckpointError, ConfigError, StopSignal
from core.json_lines import read_lines
from core.options.commands import (
    ConvertConfig,
    EvaluateConfig,
    FindConfig,
    PredictConfig,
    ReportConfig,
    RunsConfig,
    SweepConfig,
)
from core.options.declarations import TrainConfig
from core.options.files import comments_of, keys_of_options
from core.options.help import help_text
from core.options.overrides import check_overrides, parse_overrides, with_quoted_paths
from core.options.schema import check, names_of, options_of
from core.resume import resumed_folder
from core.run_config import read_run_config
from trainer.inference.load_run import load_run

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = {
    "train": TrainConfig,
    "sweep": SweepConfig,
    "evaluate": EvaluateConfig,
    "find": FindConfig,
    "predict": PredictConfig,
    "report": ReportConfig,
    "runs": RunsConfig,
    "convert": ConvertConfig,
}
RESULTS_DEPEND_ON = {  # free on resume, but other values are another experiment
    *("optimizer.lr", "optimizer.momentum", "optimizer.weight_decay", "optimizer.adamw_lr"),
    *("trainer.max_epochs", "trainer.max_steps", "trainer.max_minutes", "trainer.clip_norm", "trainer.on_nonfinite"),
    *(f"trainer.early_stopping.{key}" for key in ("monitor", "mode", "patience", "min_delta", "geometric")),
}
NO_EFFECT_ON_RESULTS = {  # free on resume, with equal results
    *("trainer.device", "trainer.threads", "trainer.log_every", "trainer.histograms_every", "trainer.log_graph"),
    *("trainer.log_images", "trainer.checkpoint.every_steps", "trainer.checkpoint.keep"),
    *("data.num_workers", "data.timeout_s", "data.on_bad_image", "data.cache_dir", "data.root", "data.download"),
    *("data.mirror", "name", "tags"),
}
OF_THE_RUN = {"run_dir", "resume", "trust", "traceback"}


# Declarations


def test_options_free_on_resume_and_compared_options_equal_the_lists():
    assert set(names_of(TrainConfig, free_on_resume=True)) == RESULTS_DEPEND_ON | NO_EFFECT_ON_RESULTS
    assert set(names_of(TrainConfig, compared=False)) == NO_EFFECT_ON_RESULTS | OF_THE_RUN


ALLOWED: dict[str, tuple[list[Any], list[Any]]] = {  # key -> (allowed, refused), from the comments in configs/
    "seed": ([0, 2**53], [-1, 1.0, True, "1", None]),
    "data.image_size": ([1, 16384], [0, 16385]),
    "data.stored_size": ([None, 64], ["64"]),
    "data.channels": ([1, 3], [2, True, 3.0]),
    "data.val_fraction": ([0, 0.5], [1, -0.1, math.nan]),
    "data.drop_last": (["auto", True, False], ["yes", 1, None]),
    "optimizer.lr": ([1e-9, 1], [0, math.inf, "0.1", True]),
    "optimizer.betas": ([[0, 0.999]], [[0.9], [0.9, 1], 0.9]),
    "optimizer.adamw_lr": ([None, 0.1], [0]),
    "schedule.momentum": ([None, [0.8, 0.9]], [[0, 0.9], 0.9]),
    "loss.class_weights": ([None, "balanced", [1, 2.5]], ["even", [0]]),
    "trainer.log_every": (["2 steps", "1.5 epochs", "10%"], ["2", 2, "0 steps", None]),
    "trainer.histograms_every": ([None, "1 epoch"], ["never"]),
    "trainer.early_stopping.geometric": ([None, 2], [1]),
    "trainer.early_stopping": ([{}], [None, 3]),
    "choices": ([{"model": "mlp"}], ["mlp"]),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_declared_type_and_range_accept_and_refuse_the_listed_values(name):
    rule = options_of(TrainConfig)[name].rule
    allowed, refused = ALLOWED[name]
    assert [rule(value) for value in allowed] == [None] * len(allowed)
    assert all(str(rule(value)).startswith(("must be", "each item must be")) for value in refused)


@pytest.mark.parametrize("script", SCHEMAS)
def test_each_option_has_a_yaml_line_with_a_comment(script):
    """The line is in the script's file, in a group's file, or in the file of an option that has the key."""
    commented = set(comments_of(CONFIGS / f"{script}.yaml")) | set(comments_of(CONFIGS / "train.yaml"))
    for group in ("data", "model", "optimizer", "schedule", "loss", "trainer", "sweep", "find"):
        for path in (CONFIGS / group).glob("*.yaml"):
            commented |= {f"{group}.{key}" for key in comments_of(path)}
    options = options_of(SCHEMAS[script])
    sections = {name.rpartition(".")[0] for name in options} | {"augment", "choices"}
    assert {name for name in options if name not in sections and name not in commented} == set()


def test_each_key_of_a_section_without_arguments_is_declared():
    closed = ("trainer", "sweep")
    keys = {key for key in keys_of_options() if key.partition(".")[0] in closed}
    keys = {key for key in keys if not key.endswith(".defaults") and not key.startswith("sweep.space.")}
    # Files in the group `sweep` may also set keys of the training, beside the section `sweep`.
    keys = {key for key in keys if key.partition(".")[0] == "trainer" or key in options_of(SweepConfig)}
    assert keys and keys <= set(options_of(SweepConfig))


def test_missing_required_key_is_named():
    values = json.loads(json.dumps(composed().values))
    del values["trainer"]["tta"]
    with pytest.raises(ConfigError, match=r"trainer\.tta: missing"):
        check(values, TrainConfig, record=values)


# Help


def test_help_shows_the_comment_of_each_key_beside_it():
    values = {"seed": 0, "model": {"hidden": [256, 256], "dropout": 0.0}, "trainer": {"tta": "none", "max_steps": None}}
    choices = {"model": "mlp", "trainer": "default"}
    text = help_text("$CONFIG", values, schema=TrainConfig, choices=choices, config_name="train", folders=[CONFIGS])
    assert yaml.safe_load(text) == values
    joined = " ".join(line.strip().lstrip("# ") for line in text.splitlines())
    for path, key in (("model/mlp.yaml", "hidden"), ("model/mlp.yaml", "dropout")):
        line = next(line for line in (CONFIGS / path).read_text().splitlines() if line.startswith(f"{key}:"))
        assert line.partition("#")[2].strip().split(" [] ")[0] in re.sub(r"\s*#\s*", " ", joined)
    assert joined.count("(free on resume)") == 1 and "or null: no limit (free on resume)" in joined
    assert all(len(line) <= 120 for line in text.splitlines())


def test_comments_of_bases_are_inherited(tmp_path):
    (tmp_path / "base.yaml").write_text("# The base.\na: 1 # one\n# Above\n# b.\nb:\n  c: '# none' # c\nd: [1, 2]\n")
    (tmp_path / "mine.yaml").write_text("# Mine.\ndefaults: [base, _self_]\na: 2 # two\n")
    comments = comments_of(tmp_path / "mine.yaml")
    assert comments == {"": "Mine.", "a": "two", "b": "Above b.", "b.c": "c"}


# Overrides


OVERRIDES = {
    "model=lenett": "model = lenett: no such option; did you mean lenet?",
    "model=mlp,lenett": "model = lenett: no such option",
    "augment=[flip,3]": r"augment = \[flip, 3\]: must be one of affine",
    "trainer.early_stopping=3": "trainer.early_stopping = 3: must be a section of keys; to turn it off",
    "++trainer.max_epoch=3": "trainer.max_epoch = 3: unknown key; did you mean trainer.max_epochs",
    "~trainer.max_epoch": "trainer.max_epoch: unknown key; did you mean trainer.max_epochs",
    "optimizer.lr=[b": r"optimizer.lr=\[b: must be KEY=VALUE in Hydra's syntax",
    "sweep.trials=3": "sweep.trials = 3: unknown key",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_invalid_override_is_refused_with_a_hint(override):
    with pytest.raises(ConfigError, match=OVERRIDES[override]):
        check_overrides(parse_overrides([override]), TrainConfig)


@pytest.mark.parametrize(
    "override",
    [
        *("model=mlp,lenet", "augment=[flip,mixup]", "augment=[]", "experiment=null", "trainer.max_epochs=3", "~loss"),
        *("trainer.max_epochs=1,2", "seed=range(1,3)", "model.hidden=[3]", "++optimizer.eps=1", "hydra.verbose=true"),
        *("trainer.early_stopping={patience:3}", "model=glob(vgg*)", "run_dir='a=b'", "trainer.checkpoint=${trainer}"),
    ],
)
def test_valid_override_is_accepted(override):
    check_overrides(parse_overrides([override]), TrainConfig)


def test_sweep_keys_are_accepted_by_the_sweep_schema():
    check_overrides(parse_overrides(["sweep.trials=3", "sweep.space.optimizer.lr=[1,2]"]), SweepConfig)


def test_option_in_a_user_config_folder_is_accepted(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("_target_: torch.nn.Identity\n")
    check_overrides(parse_overrides(["model=mine"]), TrainConfig, folders=[tmp_path])
    with pytest.raises(ConfigError, match="one of: airbench"):
        check_overrides(parse_overrides(["model=mine"]), TrainConfig)


# Edited config.yaml


def stopped_run(folder: Path, *overrides: str) -> Path:
    run = built(folder, *overrides)
    stop_after(run, 4)
    with pytest.raises(StopSignal):
        run_to_end(run)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    """Change values of RUN/config.yaml; `trainer__l1` is the key trainer.l1."""
    config = read_run_config(folder)
    for name, value in changes.items():
        section = config
        *sections, key = name.split("__")
        for name_of_section in sections:
            section = section[name_of_section]
        section[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def test_edited_key_that_is_not_free_is_refused_by_name(tmp_path):
    folder = stopped_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    edit(folder, trainer__l1=0.5, model__dropout=0.25, trainer__max_epochs=9)
    with pytest.raises(CheckpointError) as caught:
        reopened(folder)
    text = str(caught.value)
    assert caught.value.subject == str(folder / "config.yaml") and caught.value.exit_code == 6
    assert "model.dropout: 0.0 -> 0.25; trainer.l1: 0.0 -> 0.5. Free" in text and "max_epochs: 2" not in text
    assert {path: path.read_bytes() for path in before if path.name != "config.yaml"} == {
        path: content for path, content in before.items() if path.name != "config.yaml"
    }
    edit(folder, trainer__l1=0.0, model__dropout=0.0, trainer__max_epochs=2)
    assert reopened(folder) is not None


def test_edited_key_that_is_free_is_used_and_recorded(tmp_path):
    folder = stopped_run(tmp_path / "run", "schedule=constant")
    edit(folder, optimizer__lr=0.01, trainer__max_epochs=3)
    run = reopened(folder, "trainer.log_every=2 steps")
    assert run is not None
    run_to_end(run)
    changes = {"optimizer.lr": [0.05, 0.01], "trainer.max_epochs": [2, 3], "trainer.log_every": ["1 steps", "2 steps"]}
    assert read_lines(folder / "events.jsonl")[-1]["changes"] == changes
    assert run.state.step == 18 and read_lines(folder / "metrics.jsonl")[-1]["lr"] == 0.01
    # The recorded changes are now part of the run's config, so the next resume finds no change in them.
    second_resume = reopened(folder, "trainer.max_epochs=4")
    assert second_resume is not None
    run_to_end(second_resume)
    assert read_lines(folder / "events.jsonl")[-1]["changes"] == {"trainer.max_epochs": [3, 4]}


def test_removed_key_is_refused_by_name(tmp_path):
    folder = stopped_run(tmp_path / "run")
    config = read_run_config(folder)
    del config["model"]["pieces"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match=r"model\.pieces: 5 -> absent"):
        reopened(folder)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("data:\n", "data: digits\nx:\n", r"config\.yaml: data = digits: must be a section of keys"),
        ("seed: 0", "true: 0", r"config\.yaml: True = 0: unknown key"),
        ("tta: none", "tta: both", r"config\.yaml: trainer\.tta = both: must be one of none, mirror"),
        ("tta: none\n", "# tta\n", r"config\.yaml: trainer\.tta: missing"),
    ],
)
def test_wrong_run_config_is_refused_with_its_file_and_key(tmp_path, old, new, expected):
    folder = tmp_path / "run"
    trained(folder, "trainer.max_epochs=1")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(rf"^(\s*){old}", rf"\g<1>{new}", text, count=1, flags=re.M))
    for call in (lambda: reopened(folder), lambda: load_run(folder)):
        with pytest.raises(CheckpointError, match=expected):
            call()


# Early stopping on resume


def test_larger_patience_continues_a_run_that_stopped_early(tmp_path):
    """With a learning rate near 0, no metric improves by 0.5, so patience 2 stops the run after epoch 3."""
    no_progress = ("optimizer.lr=1e-9", "trainer.max_epochs=6", "trainer.early_stopping.min_delta=0.5")
    folder = tmp_path / "run"
    run = trained(folder, *no_progress, "trainer.early_stopping.patience=2")
    assert (run.state.step, json.loads((folder / "summary.json").read_text())["status"]) == (18, "stopped_early")
    best = run.state.early_stopping.best
    reason = f"early stopping: val/accuracy has not improved since epoch 1 ({best:.4f})"
    assert reason in (folder / "train.log").read_text()
    assert reopened(folder) is None
    run = reopened(folder, "trainer.early_stopping.patience=4")
    assert run is not None
    run_to_end(run)
    assert run.state.step == 30  # after epoch 5, four epochs after the best
    assert read_lines(folder / "events.jsonl")[-1]["changes"] == {"trainer.early_stopping.patience": [2, 4]}


def test_changed_monitor_restarts_the_patience_on_resume(tmp_path):
    no_progress = ("optimizer.lr=1e-9", "trainer.max_epochs=8", "trainer.early_stopping.min_delta=0.5")
    folder = tmp_path / "run"
    trained(folder, *no_progress, "trainer.early_stopping.patience=2")
    run = reopened(folder, "trainer.early_stopping.monitor=train/loss")
    assert run is not None and run.state.early_stopping.best is None
    run_to_end(run)
    assert run.state.step == 36  # epoch 4 gives the first train/loss; two more epochs without improvement


def test_one_monitor_decides_on_early_stopping_and_best_checkpoint():
    for overrides, expected in (
        ((), ("val/accuracy", "val/accuracy")),
        (("trainer.early_stopping.monitor=val/loss",), ("val/loss", "val/loss")),
        (("trainer.checkpoint.monitor=train/loss",), ("val/accuracy", "train/loss")),
    ):
        trainer = composed(*overrides).values["trainer"]
        assert (trainer["early_stopping"]["monitor"], trainer["checkpoint"]["monitor"]) == expected


@pytest.mark.parametrize("schedule", ["cosine", "torch_scheduler"])
def test_resume_reports_the_learning_rate_before_and_after(tmp_path, schedule):
    """The line is right: the learning rates logged at the last evaluation, and at the first step after the resume."""
    options = {
        "cosine": ("schedule=cosine", "schedule.warmup_epochs=0"),
        "torch_scheduler": (
            *("schedule=torch", "schedule._target_=torch.optim.lr_scheduler.StepLR", "+schedule.step_size=5"),
            *("schedule.gamma=0.5", "schedule.interval=step"),
        ),
    }[schedule]
    folder = tmp_path / "run"
    trained(folder, *options, "trainer.max_epochs=2")
    before = read_lines(folder / "metrics.jsonl")[-1]["lr"]
    run = reopened(folder, "trainer.max_epochs=4", "optimizer.lr=0.02")
    assert run is not None
    applied: list[float] = []
    run.state.optimizer.register_step_pre_hook(lambda optimizer, *_: applied.append(optimizer.param_groups[0]["lr"]))
    run_to_end(run)
    line = f"learning rate: {before:.3g} at the last evaluation, {applied[0]:.3g} in the next step"
    assert line in (folder / "train.log").read_text()


# A new option


def test_diff_of_contributing_adds_a_complete_option_in_three_places(tmp_path, monkeypatch, capfd):
    """Applies the diff in CONTRIBUTING to a copy; the option is then validated, suggested, explained and recorded."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert diff is not None
    for name in ("src", "configs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    applied = subprocess.run(["git", "apply", "-"], input=diff[1], text=True, capture_output=True, cwd=tmp_path)
    assert applied.returncode == 0, applied.stderr
    files = re.findall(r"^\+\+\+ b/(.*)$", diff[1], re.M)
    assert len(files) == len(set(files)) == 3 and len(re.findall(r"^\+[^+]", diff[1], re.M)) == 3

    def train(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "scripts/train.py", *arguments]
        environment = {"PYTHONPATH": str(tmp_path / "src"), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        return done.returncode, done.stdout, done.stderr

    key = re.search(r"^\+(\w+): .* # (.*)$", diff[1], re.M)
    assert key is not None
    code, out, _ = train("--help")
    assert code == 0 and f"{key[1]}: " in out and key[2].split(";")[0] in re.sub(r"\s*\n\s*#\s*", " ", out)
    code, _, err = train(f"trainer.{key[1]}=3")
    assert code == 2 and err.startswith(f"error[config] trainer.{key[1]} = 3: must be ")
    code, _, err = train(f"trainer.{key[1][:-1]}=true")
    assert code == 2 and f"did you mean trainer.{key[1]}?" in err
    small = ("data.limit_train=80", "data.limit_eval=20", "model=mlp", "trainer.max_epochs=1", "trainer.threads=1")
    code, _, err = train(*small, "run_dir=run", f"trainer.{key[1]}=false")
    assert code == 0, err
    assert dict(leaves(read_run_config(tmp_path / "run")))[f"trainer.{key[1]}"] is False
    code, _, err = train("resume=run", f"trainer.{key[1]}=true")
    assert code == 6 and f"trainer.{key[1]}: false -> true" in err


def test_scripts_pass_the_schema_of_their_config(monkeypatch):
    schemas = {}

    def launch(main: str, *, config_name: str, schema: Any, before_import: str | None = None) -> None:
        schemas[config_name] = schema

    monkeypatch.setattr("core.command_line.launch", launch)
    for name in SCHEMAS:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    assert schemas == SCHEMAS


PATHS = ["plain", "a b", "a=b", "[1]", "(x", "{a", "Läufe/ü", "it's", 'say "x"', "5", "1e3", "a,b", "true", "a:b", "#1"]
PATHS += ["%41", "x\\y", "a\\", "日本", "a;b&c|d", "$x", "a\tb", " a "]


@pytest.mark.parametrize("path", PATHS)
def test_any_path_can_be_typed_without_quotes_for_hydra(path):
    """In every path key of every script."""
    for schema in SCHEMAS.values():
        for key, option in options_of(schema).items():
            if not option.is_path or (option.takes_lists and path == "[1]"):  # a list of runs
                continue
            (quoted,) = with_quoted_paths([f"+{key}={path}" if "." in key else f"{key}={path}"], schema)
            (override,) = parse_overrides([quoted])
            assert override.value() == path, (schema, key)
            assert with_quoted_paths([quoted], schema) == [quoted]
    assert resumed_folder(with_quoted_paths([f"resume={path}"], TrainConfig)) == Path(path)


def test_home_folder_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = {
        schema: [name for name, option in options_of(schema).items() if option.is_path] for schema in SCHEMAS.values()
    }
    assert names[TrainConfig] == ["run_dir", "resume", "init_from", "data.root", "data.cache_dir"]
    assert names[SweepConfig] == [*names[TrainConfig], "sweep.dir"]
    assert (names[EvaluateConfig], names[PredictConfig]) == (["run", "root", "output"], ["run", "input", "output"])
    assert names[RunsConfig] == ["folder", "output", "curves"]
    for schema, keys in names.items():
        for key in keys:
            assert with_quoted_paths([f"{key}=~/x"], schema) == [f"{key}={tmp_path}/x"]
    assert composed("run_dir='~/x'", "init_from='~'").values["run_dir"] == f"{tmp_path}/x"  # in a file or in quotes
    assert with_quoted_paths(["optimizer.lr=~/x", "run_dir=null", "run_dir='~/a'", "model=mlp"], TrainConfig) == [
        *("optimizer.lr=~/x", "run_dir=null", "run_dir='~/a'", "model=mlp"),
    ]
    assert with_quoted_paths(["-m", "run_dir=a,b"], TrainConfig) == ["-m", "run_dir=a,b"]  # a grid


def test_none_in_a_path_suggests_null():
    with pytest.raises(ConfigError, match="init_from = None: must be a path; for none type null"):
        composed("init_from=None")
