"""Start-up time: scripts print help and configs without importing torch."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "train": [],
    "evaluate": ["run=x"],
    "predict": ["run=x", "input=x"],
    "report": ["run=x"],
    "check": [],
    "runs": [],
    "sweep": [],
}
LIMIT = 1.0  # seconds, with -X importtime; the fastest of several tries


def start(*arguments: str) -> tuple[float, str, set[str]]:
    """Run Python with -X importtime and return (seconds, stdout, imported modules)."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr[-500:]
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    return seconds, done.stdout, modules


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--help", "--cfg=job"])
def test_help_and_config_are_printed_without_importing_torch(script, flag):
    _, out, modules = start(f"scripts/{script}.py", *SCRIPTS[script], *flag.split("="))
    assert not modules & {"torch", "torchvision", "sklearn", "numpy", "tensorboard", "optuna", "sqlalchemy"}
    assert {"train": "max_epochs", "runs": "folder", "sweep": "sweep"}.get(script, "checkpoint") in out


@pytest.mark.timing
def test_help_takes_less_than_a_second():
    tries = [start("scripts/train.py", "--help")[0] for _ in range(5)]
    assert min(tries) < LIMIT, f"{tries} s"


def test_version_flag_prints_the_versions_without_importing_torch():
    _, out, modules = start("scripts/train.py", "--version")
    assert re.fullmatch(r"preceptor \d+\.\d+\.\d+ \(torch [\w.+]+, torchvision .*, Python 3\.\d+\.\d+\)\n", out)
    assert "torch" not in modules


def test_help_lists_all_options_and_the_keys_with_the_given_overrides(tmp_path):
    for name in ("mine", "_part"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / f"{name}.yaml").write_text("_target_: torch.nn.Identity\nnumber: 7\n")
    arguments = ("--help", "-m", "--config-dir", str(tmp_path), "model=mine", "optimizer.lr=0.3", "data=image_folder")
    _, out, _ = start("scripts/train.py", *arguments)
    choices, keys = out.partition("Choices")[2].split("Keys")
    listed_options = dict(line.split(": ") for line in choices.replace("\n  ", " ").splitlines() if ": " in line)
    for group in (ROOT / "configs").glob("[!_]*/"):
        options = {path.stem for path in group.glob("[!_]*.yaml")} | ({"mine"} if group.name == "model" else set())
        if group.name != "hydra":
            assert listed_options[group.name].split(", ") == sorted(options)
    keys = yaml.safe_load(keys.partition("\n")[2])
    assert (keys["model"]["number"], keys["optimizer"]["lr"], keys["data"]["root"]) == (7, 0.3, "???")
    command = f"{sys.executable} scripts/train.py --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "Trains an image classifier and writes a run folder.\n" and done.stderr == ""
    _, out, _ = start("scripts/train.py", "--help", "--cfg", "job")  # Hydra's built-in help
    assert "Choices" in out and "max_epochs" in out


def test_training_does_not_import_unneeded_packages(tmp_path):
    arguments = ("data=synthetic", "data.train_samples=40", "data.test_samples=10", "data.image_size=8")
    arguments += ("data.batch_size=8", "model=mlp", "model.hidden=[]", "trainer.max_steps=1", f"run_dir={tmp_path}/run")
    arguments += ("trainer.log_images=false",)  # with it, matplotlib draws the mistakes at the end
    _, _, modules = start("scripts/train.py", *arguments)
    assert "torch" in modules
    assert not modules & {"sklearn", "torchvision", "scipy", "pandas", "matplotlib"}


def test_run_config_is_read_without_hydra():
    """A notebook that loads a run needs only `core.run_config` to read the config."""
    _, _, modules = start("-c", "import core.run_config")
    assert "yaml" in modules and not modules & {"hydra", "omegaconf", "rich", "tensorboard"}


@pytest.mark.parametrize("script", ["train", "evaluate", "predict", "runs", "sweep", "look", "convert", "zoo"])
@pytest.mark.parametrize("hidden", ["core/__init__.py", "models/__init__.py", "data.py"])
def test_scripts_name_both_folders_if_a_users_folder_hides_a_package(tmp_path, script, hidden):
    file = tmp_path / "mine" / hidden
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "mine/trainer").mkdir()  # no package: it hides nothing
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "mine"), str(ROOT / "src")])}
    command = [sys.executable, str(ROOT / f"scripts/{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    name = Path(hidden).parts[0].removesuffix(".py")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    other = file.parent if file.name == "__init__.py" else file
    assert line.startswith(f"error[config] {name}: would be imported from {other} instead of {ROOT / 'src' / name};")
    assert f"remove {tmp_path / 'mine'} from PYTHONPATH" in line
    environment["PYTHONPATH"] = str(ROOT / "src")
    if hidden == "data.py":
        assert subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, check=False).returncode == 0
