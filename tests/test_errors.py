"""Invalid input gives one line on stderr with the key and the allowed values, and leaves no files.

The scripts run in this process, from the command line to the exit code.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from core.config import CONFIGS

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_DATA = (
    *("model=mlp", "model.hidden=[8]", "trainer.max_epochs=1", "trainer.log_graph=false", "trainer.log_images=false"),
)
FAST = (
    *("data=synthetic", "data.image_size=8", "data.train_samples=60", "data.test_samples=20", "data.batch_size=16"),
    *("data.num_classes=3", *WITHOUT_DATA),
)


@pytest.fixture
def script(tmp_path, monkeypatch, capfd):
    """Return a function that runs a script in an empty folder and returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRECEPTOR_DATA", raising=False)

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *arguments])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run


CONFIG = {
    "unknown option": (["model=resnet19"], "model = resnet19", ["did you mean resnet18?", "lenet5, maxout, mlp, nin"]),
    "unknown group": (["modle=mlp"], "modle = mlp", ["did you mean model?"]),
    "misspelt key": (["trainer.max_epoch=3"], "trainer.max_epoch = 3", ["did you mean trainer.max_epochs?"]),
    "misspelt plus": (["+trainer.max_epoch=3"], "trainer.max_epoch = 3", ["did you mean trainer.max_epochs?"]),
    "interval of a built-in schedule": (["+schedule.interval=step"], "schedule.interval = step", ["schedule=torch"]),
    "warm-up of torch's": (["schedule=torch", "+schedule.warmup_epochs=5"], "schedule.warmup_epochs = 5", ["not used"]),
    "momentum of plateau": (
        ["schedule=plateau", "+schedule.momentum=[0.8,0.9]"],
        "schedule.momentum = [0.8, 0.9]",
        ["schedule=one_cycle"],
    ),
    "cycle of two": (
        ["seed=${trainer.accumulate}", "trainer.accumulate=${seed}"],
        "seed: refers to itself: seed -> trainer.accumulate -> seed",
        ["set one of these keys to a value"],
    ),
    "cycle behind a key": (
        [
            "run_dir=${seed}",
            "seed=${trainer.threads}",
            "trainer.threads=${trainer.accumulate}",
            "trainer.accumulate=${seed}",
        ],
        "seed: refers to itself: seed -> trainer.threads -> trainer.accumulate -> seed",
        [],
    ),
    "root of embedded data": (
        ["data=digits", "+data.root=/nowhere"],
        "data.root = /nowhere",
        ["takes no such argument", "data=cifar10", "have it"],
    ),
    "another spelling": (["trainer.device=gpu"], "trainer.device = gpu", ["did you mean cuda?"]),
    "another section": (["optimiser.lr=0.1"], "optimiser.lr = 0.1", ["did you mean optimizer.lr?"]),
    "no section": (["lr=0.1"], "lr = 0.1", ["did you mean optimizer.lr?"]),
    "no section and another name": (["epochs=5"], "epochs = 5", ["did you mean trainer.max_epochs?"]),
    "another option's": (["model.hidden=[8]"], "model.hidden = [8]", ["model=mlp does; "]),
    "another option's, added": (["+model.hidden=[8]"], "model.hidden = [8]", ["model=mlp has it"]),
    "another option's, in a grid": (["-m", "model.hidden=[8],[9]"], "model.hidden = [8]", ["model=mlp does; "]),
    "exists already": (["+trainer.l1=0.1"], "trainer.l1 = 0.1", ["leave out the +"]),
    "a section's": (["model.hidden.first=3", "model=mlp"], "model.hidden.first = 3", []),
    "not by null": (
        ["trainer.early_stopping=null"],
        "trainer.early_stopping = null",
        ["trainer.early_stopping.patience=null"],
    ),
    "quoted number": (["optimizer.lr='0.1'"], "optimizer.lr = 0.1", ["this is text: type it without quotes"]),
    "empty": ([""], "command line", ["an empty argument"]),
    "word without a key": (["data=digits", "digit"], "digit", ["must be KEY=VALUE"]),
    "option without its group": (["mnist"], "mnist", ["did you mean data=mnist?"]),
    "flags that exclude each other": (["-m", "--cfg", "job"], "--cfg", ["cannot be combined with -m"]),
    "misspelt top": (["+sede=3"], "sede = 3", ["did you mean seed?"]),
    "misspelt model": (["+model.activatoin=relu"], "model.activatoin = relu", ["did you mean activation?"]),
    "misspelt data": (["+data.batchsize=3"], "data.batchsize = 3", ["did you mean batch_size?"]),
    "misspelt optimizer": (["+optimizer.momentun=0.5"], "optimizer.momentun = 0.5", ["did you mean momentum?"]),
    "misspelt augment": (
        ["augment=crop_flip", "+augment.crop.pading=3"],
        "augment.crop.pading = 3",
        ["did you mean padding?"],
    ),
    "learning rate: negative": (["optimizer.lr=-0.1"], "optimizer.lr = -0.1", ["must be a number > 0"]),
    "learning rate: nan": (["optimizer.lr=nan"], "optimizer.lr = nan", ["must be a number > 0"]),
    "learning rate: inf": (["optimizer.lr=inf"], "optimizer.lr = inf", ["must be a number > 0"]),
    "learning rate: text": (["optimizer.lr=1e-3x"], "optimizer.lr = 1e-3x", ["must be a number > 0"]),
    "out of range: epochs": (["trainer.max_epochs=0"], "trainer.max_epochs = 0", ["must be an integer >= 1"]),
    "out of range: zero": (["data.batch_size=0"], "data.batch_size = 0", ["must be an integer >= 1"]),
    "out of range: minus": (["data.batch_size=-1"], "data.batch_size = -1", ["must be an integer >= 1"]),
    "out of range: fraction": (["data.batch_size=1.5"], "data.batch_size = 1.5", ["must be an integer >= 1"]),
    "mandatory root": (["data=image_folder"], "data.root = ???", ["mandatory", "data.root=..."]),
    "wrong type: list": (["seed=[1,2]"], "seed = [1, 2]", ["must be an integer >= 0"]),
    "wrong type: null": (["trainer.device=null"], "trainer.device = null", ["must be auto, cpu, cuda, cuda:N"]),
    "wrong type: section": (["model=null"], "model = null", ["must be one of", "lenet5"]),
    "wrong type: flag": (["trainer.compile=1"], "trainer.compile = 1", ["must be true or false"]),
    "wrong type: hidden": (["model=mlp", "model.hidden=64"], "model.hidden = 64", ["list"]),
    "monitor: early": (
        ["trainer.early_stopping.monitor=val/f1"],
        "trainer.early_stopping.monitor = val/f1",
        ["train/loss, train/accuracy, val/loss, val/accuracy"],
    ),
    "monitor: checkpoint": (
        ["trainer.checkpoint.monitor=val/f1"],
        "trainer.checkpoint.monitor = val/f1",
        ["train/loss, train/accuracy, val/loss, val/accuracy"],
    ),
    "monitor: no validation": (
        ["data.val_fraction=0.0"],
        "trainer.early_stopping.monitor = val/accuracy",
        ["(data.val_fraction = 0)", "available: train/loss, train/accuracy"],
    ),
    "size: size": (["model=lenet", "data.image_size=8"], "data.image_size = 8", ["at least 16"]),
    "size: channels": (["model.in_channels=3"], "model.in_channels = 3", ["the data has 1"]),
    "classes: model": (["model.num_classes=5"], "model.num_classes = 5", ["10 classes"]),
    "classes: data": (["data.num_classes=5"], "data.num_classes = 5", ["10 classes"]),
    "device: fp16": (["trainer.precision=fp16", "trainer.device=cpu"], "trainer.precision = fp16", ["fp32 or bf16"]),
    "out of range: endless": (["trainer.log_every=1e999 steps"], "trainer.log_every = 1e999 steps", ["a duration > 0"]),
    "range: warm-up": (
        ["schedule.warmup_epochs=1e308"],
        "schedule.warmup_epochs = 1e+308",
        ["must be a number in [0"],
    ),
    "out of range: samples": (["data=synthetic", "data.noise='0.1'"], "data.noise = 0.1", ["must be a number >= 0"]),
    "wrong type: data": (["data._target_=torch.nn.Identity"], "data._target_ = torch.nn.Identity", ["Collection"]),
    "wrong type: empty target": (["data._target_=''"], "data._target_ = ", ["must be text"]),
    "wrong type: module": (["model._target_=models.mlp"], "model._target_ = models.mlp", ["leads to a module"]),
    "wrong type: group": (["trainer=[true]"], "trainer = [true]", ["must be one of default"]),
    "wrong type: section of a list": (["trainer.checkpoint=[0]"], "trainer.checkpoint = [0]", []),
    "wrong type: no signature": (["loss._target_=builtins.dict"], "loss", []),
    "wrong type: step": (["augment=noise_blur", "augment.noise=null"], "augment.noise._target_", ["missing"]),
    "deleted": (["~data.fit"], "data.fit", ["missing"]),
    "deleted target": (["~loss._target_"], "loss._target_", ["missing"]),
    "lines": (["trainer.device='two\nlines'"], "trainer.device = two lines", ["must be auto, cpu"]),
    "momentum of another schedule": (["+schedule.momentum=[0.8,0.9]"], "schedule.momentum", ["schedule.rise"]),
    "no budget": (["trainer.max_epochs=null"], "trainer.max_epochs = null", ["trainer.max_steps"]),
    "warm-up": (
        ["schedule.warmup_epochs=99"],
        "schedule.warmup_epochs = 99",
        ["must be fewer than the 630 steps of the run"],
    ),
    "weights": (["loss.class_weights=[1.0,2.0]"], "loss.class_weights = [1.0, 2.0]", ["must be a list of 10"]),
    "target": (["model._target_=models.lenet.LeNet6"], "model._target_ = models.lenet.LeNet6", ["did you mean LeNet"]),
    "list of options": (["augment=[crop_flip,afine]"], "augment = afine", ["did you mean affine?", "crop_flip"]),
    "not in this file": (
        ["optimizer.nesterov=true"],
        "optimizer.nesterov = true",
        ["optimizer=muon, nesterov does; to pass it to the class: +optimizer.nesterov="],
    ),
    "no learning rate": (["~optimizer.lr"], "optimizer.lr", ["missing"]),
    "torch scheduler": (
        ["schedule=torch", "schedule._target_=torch.optim.lr_scheduler.StepLR"],
        "schedule = torch.optim.lr_scheduler.StepLR",
        ["step_size"],
    ),
    "plateau": (
        ["schedule=torch", "schedule._target_=torch.optim.lr_scheduler.ReduceLROnPlateau"],
        "schedule._target_",
        ["schedule=plateau"],
    ),
    "momentum": (["schedule=one_cycle", "schedule.momentum=[2,3]"], "schedule.momentum = [2, 3]", ["(0, 1)"]),
    "no momentum": (["schedule=one_cycle", "optimizer=rmsprop"], "schedule.momentum = [0.85, 0.95]", ["must be null"]),
    "learning rate: infinite": (
        ["schedule=inverse_time", "schedule.decay=inf"],
        "schedule.decay = inf",
        ["must be a number >= 0"],
    ),
    "range: periods": (
        ["schedule=cosine_restarts", "schedule.periods=2000"],
        "schedule.periods = 2000",
        ["<= 100"],
    ),
    "range: padding": (
        ["augment=crop_flip", "augment.crop.padding=1.5"],
        "augment.crop.padding = 1.5",
        ["integer"],
    ),
    "type: model flag": (
        ["model=vgg_tiny", "model.batch_norm=no"],
        "model.batch_norm = no",
        ["must be true or false"],
    ),
    "size: one image": (
        ["model=mlp", "model.batch_norm=true", "data.batch_size=1"],
        "data.batch_size = 1",
        ["batch of one image"],
    ),
    "mixed labels": (
        ["loss._target_=torch.nn.MultiMarginLoss", "augment=mixup"],
        "loss = torch.nn.MultiMarginLoss",
        ["probabilities, which mixing augmentations make"],
    ),
    "some transforms": (
        ["augment=trivial_augment", "augment.trivial_augment.num_magnitude_bins=1"],
        "augment.trivial_augment",
        ["fails on an image"],
    ),
    "equal": (["model=mlp", "model.init=equal"], "model.init = equal", ["break symmetry", "equal_anyway"]),
    "threads": (["trainer.threads=999999999999"], "trainer.threads = 999999999999", ["<= 4096"]),
    "flags anywhere": (["trainer.threads=1", "--cfg", "job", "trainer.max_epoch=1"], "trainer.max_epoch = 1", []),
    "grammar": (["optimizer.lr=[b"], "optimizer.lr=[b", []),
    "flag": (["--multi-run", "seed=0,1"], "--multi-run", ["did you mean --multirun?"]),
    "pickle": (["--experimental-rerun=x.pickle"], "--experimental-rerun", ["unknown flag"]),
    "interpolation": (["trainer.device=${nope}"], "trainer.device", ["nope"]),
    "resume twice": (["resume=x", "-m"], "-m", ["cannot be combined with resume="]),
}


@pytest.mark.parametrize("case", CONFIG)
def test_invalid_config_gives_one_line_with_key_and_hint(script, case, tmp_path):
    arguments, subject, hints = CONFIG[case]
    code, _, err = script("train", *arguments)
    assert code == 2, err
    assert err.startswith(f"error[config] {subject}") and err.count("\n") == 1, err
    assert all(hint in err for hint in hints), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_is_a_config_error(script, tmp_path):
    code, _, err = script("train", "trainer.device=cuda")
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert err.startswith("error[config] trainer.device = cuda") and "cpu" in err


def test_errors_do_not_print_environment_values(script, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    code, out, err = script("train", "seed=${oc.env:SECRET_TOKEN}")
    assert code == 2 and "hunter2" not in out + err and "environment:SECRET_TOKEN" in err


def test_resume_refuses_another_architecture(script, tmp_path):
    assert script("train", *FAST, "run_dir=run")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = script("train", "resume=run", "model.hidden=[16]", "data.batch_size=5")
    assert code == 6
    assert err.startswith("error[checkpoint] resume=run") and err.count("\n") == 1
    assert "model.hidden: [8] -> [16]" in err and "data.batch_size: 16 -> 5" in err and "init_from=" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    code, _, err = script("train", "resume=run", "trainer.max_epoch=2")
    assert code == 2 and "did you mean trainer.max_epochs?" in err
    code, _, err = script("train", "resume=nothing")
    assert code == 6 and "no such run folder" in err


def write_class_folders(folder: Path, names: list[str], count: int = 3) -> None:
    for index, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (12, 12), (40 * index, 10 * number, 0)).save(folder / name / f"{number}.png")


def image_folder_for(tmp_path: Path, case: str) -> Path:
    root = tmp_path / "images"
    if case == "folder: file":
        root.write_text("")
    elif case == "folder: empty":
        root.mkdir()
    elif case == "folder: empty class":
        write_class_folders(root, ["cat", "dog"])
        (root / "eel").mkdir()
    elif case == "folder: class sets":
        write_class_folders(root / "train", ["cat", "dog"])
        write_class_folders(root / "val", ["cat", "eel"])
    return root


@pytest.mark.parametrize(
    ("case", "hints"),
    [
        ("folder: missing", ["images", "ROOT/train"]),
        ("folder: file", ["images"]),
        ("folder: empty", ["images"]),
        ("folder: empty class", ["eel", "empty_class"]),
        ("folder: class sets", ["dog", "eel"]),
    ],
)
def test_invalid_image_folder_is_a_data_error(script, tmp_path, case, hints):
    root = image_folder_for(tmp_path, case)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = script("train", "data=image_folder", f"data.root={root}", "data.image_size=32", "model=resnet20")
    assert code == 3 and err.startswith("error[data]") and err.count("\n") == 1, err
    assert all(hint in err for hint in hints), err
    assert sorted(tmp_path.rglob("*")) == before


def test_empty_class_is_kept_if_configured(script, tmp_path):
    root = image_folder_for(tmp_path, "folder: empty class")
    code, _, err = script(
        *("train", "data=image_folder", f"data.root={root}", "data.image_size=8", "data.empty_class=keep"),
        *("data.batch_size=2", "data.test_fraction=0.34", "data.val_fraction=0.5", "run_dir=run", *WITHOUT_DATA),
    )
    assert code == 0, err
    assert "num_classes: 3" in (tmp_path / "run/config.yaml").read_text()


def test_missing_official_data_names_the_folder(script, tmp_path):
    code, _, err = script("train", "data=mnist", "data.download=false", f"data.root={tmp_path}/none")
    assert code == 3 and err.startswith("error[data]") and err.count("\n") == 1
    assert "none" in err and "MNIST/raw" in err and "data.root" in err
    assert list(tmp_path.iterdir()) == []


def test_batch_larger_than_the_data_is_a_config_error(script, tmp_path):
    code, _, err = script("train", *FAST, "data.batch_size=64")
    assert code == 2 and "data.batch_size = 64" in err and "54" in err, err
    assert list(tmp_path.iterdir()) == []


def test_single_last_sample_is_dropped_for_batch_norm(script, tmp_path):
    """55 samples in batches of 18 leave a last batch of one, which batch norm cannot process; `auto` drops it."""
    arguments = (*FAST, "data.train_samples=60", "data.val_fraction=0.0834", "data.batch_size=18")
    monitors = ("model.batch_norm=true",)
    code, out, err = script("train", *arguments, *monitors, "run_dir=run")
    assert code == 0 and "train 55" in out, (out, err)
    assert out.count("1 of 55 training samples are left out of each epoch (data.drop_last)") == 1


def test_labels_outside_the_classes_are_a_data_error(script, tmp_path, monkeypatch):
    """The labels come from a user-defined data set."""
    (tmp_path / "mydata.py").write_text(
        "import torch\nfrom data.sources.collection import Collection\nfrom data.sources.images import Images\n"
        "def wrong(*, label):\n"
        "    labels = torch.arange(40) % 4\n"
        "    labels[7] = label\n"
        "    images = Images(torch.zeros(40, 1, 8, 8, dtype=torch.uint8), labels)\n"
        "    return Collection(train=images, val=None, test=None, class_names=list('abcd'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    base = ("data=synthetic", "~data.train_samples", "~data.test_samples", "~data.noise", "data._target_=mydata.wrong")
    for label, reported in ((-1, "-1"), (4, "4")):
        arguments = (*base, f"+data.label={label}", "data.num_classes=4", "data.channels=1", "data.image_size=8")
        code, _, err = script("train", *arguments, *WITHOUT_DATA)
        assert code == 3 and reported in err and "0 to 3" in err, err
    assert not (tmp_path / "outputs").exists()


def test_existing_run_folder_is_refused_with_a_hint_to_resume(script, tmp_path):
    (tmp_path / "run").mkdir()
    code, _, err = script("train", *FAST, "run_dir=run")
    assert code == 5 and err.startswith("error[storage] run: exists already") and "resume=run" in err
    assert list((tmp_path / "run").iterdir()) == []


def test_failed_job_of_a_grid_does_not_stop_the_other_jobs(script, tmp_path):
    code, _, err = script("train", "-m", *FAST, "optimizer.lr=0.1,-1,0.2", "run_dir=grid")
    assert code == 2
    assert err.count("\n") == 1 and err.startswith("job 1: error[config] optimizer.lr = -1")
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == ["0", "2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid"]


def test_untrusted_targets_in_a_run_folder_exit_with_7(script, tmp_path):
    """The script exits before it imports or writes anything."""
    assert script("train", *FAST, "run_dir=run")[0] == 0
    config = (tmp_path / "run/config.yaml").read_text()
    attacks = (
        "os.system",
        "torch.load",
        "torch.hub.load",
        "numpy.load",
        "models.mlp.torch.load",
        "torch.nn.Module.__class__",
    )
    attacks += (
        "trainer.inference.load_run.load_run",
        "core.durable.write_durably",
        "torchvision.datasets.utils.download_url",
    )
    for target in attacks:
        (tmp_path / "run/config.yaml").write_text(config.replace("models.mlp.MLP", target))
        for name, arguments in (("train", ["resume=run"]), ("evaluate", ["run=run"])):
            code, _, err = script(name, *arguments)
            assert code == 7 and err.startswith("error[security] model._target_"), err
    # Hydra also instantiates nodes within lists.
    hidden = "hidden:\n  - _target_: shutil.copyfile\n    src: run/config.yaml\n    dst: stolen"
    (tmp_path / "run/config.yaml").write_text(config.replace("hidden:\n  - 8", hidden))
    code, _, err = script("evaluate", "run=run")
    assert code == 7 and "model.hidden.0._target_ = shutil.copyfile" in err and not (tmp_path / "stolen").exists()
    (tmp_path / "run/config.yaml").write_text(config.replace("models.mlp.MLP", "${oc.env:HOME}"))
    assert script("evaluate", "run=run")[0] == 6


def test_signal_during_an_import_ends_the_script(script, monkeypatch):
    """pydoc, which resolves the names of a config, converts any exception of an import into its own error."""

    def importing(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as raised:
            raise RuntimeError("problem in models.mlp") from raised

    monkeypatch.setattr("trainer.build.training.build_model", importing)
    assert script("train", *FAST) == (143, "", "")
    assert script("train", *FAST, "-m", "seed=1,2") == (143, "", "")


def test_unknown_exception_is_reported_as_internal_error(script, monkeypatch):
    import trainer.run

    monkeypatch.setattr(trainer.run, "build", lambda config: 1 / 0)
    code, _, err = script("train")
    assert code == 1 and err.startswith("error[bug] internal: ZeroDivisionError") and err.count("\n") == 1
    _, _, err = script("train", "traceback=true")
    assert "Traceback" in err and "1 / 0" in err


def test_hydra_resolver_and_env_set_work_in_a_single_run(script, tmp_path, monkeypatch):
    """Both exist only while Hydra calls the job, which has returned when the run begins."""
    monkeypatch.setenv("NAME", "a")  # monkeypatch restores it
    overrides = ("+hydra.job.env_set.NAME=b", "run_dir='${hydra:runtime.choices.model}/${oc.env:NAME}'")
    code, _, err = script("train", *FAST, *overrides)
    assert code == 0, err
    assert (tmp_path / "mlp/b/summary.json").exists()


def test_empty_augment_list_and_a_torch_loss_are_accepted(script, tmp_path):
    code, _, err = script("train", *FAST, "augment=[]", "loss._target_=torch.nn.CrossEntropyLoss", "run_dir=run")
    assert code == 0, err


def test_internal_error_while_composing_is_not_a_config_error(script, monkeypatch):
    """The user can correct an error from Hydra. Any other exception is a bug, also while composing YAML files."""

    def broken(*_, **__):
        raise KeyError("fit")

    monkeypatch.setattr("core.command_line.resolve_and_check", broken)
    code, _, err = script("train")
    assert code == 1 and err.startswith("error[bug] internal: KeyError: 'fit'") and err.count("\n") == 1


def test_traceback_can_be_enabled_in_a_yaml_file(script, tmp_path, monkeypatch):
    (tmp_path / "mine/debug").mkdir(parents=True)
    (tmp_path / "mine/debug/loud.yaml").write_text("# @package _global_\ntraceback: true\n")
    monkeypatch.setattr("trainer.run.build", lambda config: 1 / 0)
    _, _, err = script("train", "--config-dir", str(tmp_path / "mine"), "debug=loud")
    assert "Traceback" in err and "1 / 0" in err


@pytest.mark.parametrize("group", ["experiment", "debug"])
def test_config_without_package_line_is_explained(script, tmp_path, group):
    (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine" / group / "short.yaml").write_text("trainer:\n  max_epochs: 1\n")
    code, _, err = script("train", "--config-dir", str(tmp_path / "mine"), f"{group}=short")
    assert code == 2 and "must start with the line # @package _global_" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("content", [b"a: \xff\n", b"seed: ${\n", b"a: [1\n"])
def test_unreadable_yaml_file_is_named(script, tmp_path, content):
    (tmp_path / "mine/debug").mkdir(parents=True)
    (tmp_path / "mine/debug/bad.yaml").write_bytes(b"# @package _global_\n" + content)
    code, _, err = script("train", "--config-dir", str(tmp_path / "mine"), "debug=bad")
    assert code == 2 and err.count("\n") == 1 and ("bad.yaml" in err or "seed" in err), err


def test_deleted_working_directory_is_a_storage_error(script, tmp_path, monkeypatch):
    deleted = tmp_path / "gone"
    deleted.mkdir()
    monkeypatch.chdir(deleted)
    deleted.rmdir()
    code, _, err = script("train")
    assert code == 5 and "working directory" in err and "change to another one" in err
    monkeypatch.chdir(tmp_path)


def test_run_folder_is_accepted_without_its_key(script, tmp_path):
    """Accepted: `evaluate.py RUN`, `train.py resume RUN`. Refused: `sweep.py resume=RUN`."""
    script("train", *FAST, "run_dir=run")
    code, out, err = script("evaluate", "run")
    assert code == 0 and "accuracy" in out, err
    code, out, err = script("evaluate", "run", "split=val")
    assert code == 0 and "val, 6 samples" in out, err
    code, out, err = script("train", "resume", "run")
    assert code == 0 and "nothing to do" in out, err
    code, _, err = script("sweep", "resume=run")
    assert code == 2 and "error[config] resume = run: is an option of train.py" in err


@pytest.mark.parametrize("edit", [("data:\n", "data: digits\nx:\n"), ("seed: 0", "true: 0")])
def test_damaged_run_config_names_its_key(script, tmp_path, edit):
    script("train", *FAST, "run_dir=run")
    file = tmp_path / "run/config.yaml"
    file.write_text(file.read_text().replace(*edit, 1))
    code, _, err = script("train", "resume=run", "trainer.max_epochs=9")
    assert code in (2, 6) and err.count("\n") == 1 and ("data" in err or "seed" in err or "True" in err), err


@pytest.mark.parametrize("name", ["my (configs), [1]", "größe=1 'x'"])
def test_errors_are_explained_with_any_name_of_a_config_folder(script, tmp_path, name):
    folder = tmp_path / name / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text((CONFIGS / "model/mlp.yaml").read_text())
    code, _, err = script("train", "--config-dir", str(folder.parent), "model=mine", "optimizer.lrr=1")
    assert (code, err) == (2, "error[config] optimizer.lrr = 1: unknown key; did you mean optimizer.lr?\n")
