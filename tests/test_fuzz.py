"""Fuzzed command lines: any input gives one useful line and an exit code, never a traceback.

    a valid command line of one option of one group  ->  1 to 4 mutations  ->  launch(all steps but the run folder)

Each case runs in a fork of this process, in an empty folder, with limited memory and without network access. Entry
point, schema, builder, data and model classes are the real ones. Only the weights are left out: models are built and
checked on the meta device, where a VGG takes no memory, and then get uninitialised memory.
"""

import os
import random
import re
import resource
import signal
import socket
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import trainer.build.training
from core.command_line import launch
from core.config import CONFIGS, Config, leaves
from core.options.declarations import TrainConfig
from core.options.schema import options_of

pytestmark = pytest.mark.thorough

GROUPS = ("model", "data", "augment", "optimizer", "schedule", "loss", "trainer", "experiment", "debug")
SIZES = {"alexnet": 227, "googlenet": 224, "inception_v3": 299}  # data.image_size, if 32 is too small
SEED = 20261126
MEMORY = 3 * 2**30  # bytes: address space that a case may add
SECONDS = 10
TOP = {"seed", "run_dir", "init_from", "trust", "traceback"}
LINE = re.compile(r"error\[(config|data|numerical|storage|checkpoint|security)\] [^\n]+: [^\n]+\n")

VALUES = (
    *("-1", "0", "1", "2", "3", "7", "-0.5", "0.5", "1.0", "1.5", "0.999", "-0.0", "5e-324", "1e-300", "100000"),
    *("1e308", "-1e308", "1e400", "nan", "inf", "-inf", "9999999999", "9007199254740993", "9" * 25, "-" + "9" * 25),
    *(
        "true",
        "false",
        "null",
        "[]",
        "[1]",
        "[0]",
        "[-1]",
        "[1,2]",
        "[0.5,0.25]",
        "[0.9,0.95]",
        "[[1,2],[3]]",
        "[null]",
    ),
    *("[[]]", "[a,b]", "[nan,nan]", "[1e308,1e308]", "[99999999999]", "[true]", "{}", "{a:1}", "{1:2}", "[{a:1}]"),
    *("{_target_:os.getcwd}", "{_target_:nope}", "{_target_:null}", "{_target_:models.mlp.MLP}", "[{_target_:nope}]"),
    *("''", "' '", "abc", "'1'", "'0.1'", "1e-3x", "ünïcödé", "'🙂'", "'a b'", "'two\nlines'", "'tab\there'", "a=b"),
    *("${seed}", "${nope}", "${oc.env:NOPE}", "${oc.env:HOME}", "${data}", "'${'", "${", "'???'", "???", "1,2"),
    *("/", "..", "~", "/dev/null", "1_000", "0x10", "0777", "1:30", "val/loss", "train/accuracy", "val/f1", "auto"),
    *("'3 epochs'", "'0 steps'", "'1e30 epochs'", "'1e999 epochs'", "'50%'", "'-1 steps'", "'0.001 samples'", "min"),
    *("relu", "sum", "balanced", "paper", "imagenet", "resize", "B", "step", "epoch"),
)
TARGETS = (
    *("os.getcwd", "math.sqrt", "torch.nn.ReLU", "torch.nn.Identity", "torch.nn.Linear", "torch.nn.NLLLoss", "null"),
    *("torch.nn.BCELoss", "torch.optim.LBFGS", "torch.optim.Adam", "torch.optim.SparseAdam", "torch.optim", "nope"),
    *("torch.optim.lr_scheduler.StepLR", "torch.optim.lr_scheduler.LambdaLR", "torch.optim.lr_scheduler.OneCycleLR"),
    *("torchvision.models.resnet18", "torchvision.models.nope", "torchvision.transforms.v2.Normalize", "'a b'", "..."),
    *(
        "models.mlp",
        "models.mlp.MLP",
        "models.resnet.ResNet",
        "models.nope.Nope",
        "trainer.optim.schedules.cosine",
        "''",
    ),
    *(
        "trainer.optim.scheduling.Plateau",
        "data.sources.datasets.digits",
        "data.sources.image_folder.image_folder",
        "data.augment.mixing.Mixup",
        "1",
    ),
    *("data.augment.geometry.RandomCrop", "builtins.int", "builtins.dict", "core.errors.ConfigError"),
    *(
        "trainer.optim.losses.Huber",
        "trainer.optim.muon.Muon",
        "[a]",
        "{}",
        "${model._target_}",
        "torch.nn.Module.forward",
    ),
)


@cache
def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("[!_]*.yaml"))


@cache
def keys(group: str, option: str) -> dict[str, Any]:
    """Return the keys that an option's file and its bases set, as typed on the command line, with their values."""
    content = yaml.safe_load((CONFIGS / group / f"{option}.yaml").read_text()) or {}
    bases = [
        base for base in content.pop("defaults", []) if isinstance(base, str) and base != "_self_" and "@" not in base
    ]
    prefix = "" if group in ("experiment", "debug") else f"{group}."
    inherited = {key: value for base in bases for key, value in keys(group, base).items()}
    return inherited | dict(leaves(content, prefix))


def base(group: str, option: str) -> tuple[list[str], dict[str, str]]:
    """Return a valid command line and the options it chooses. The files of official data sets may be missing."""
    chosen = {"model": "mlp", "data": "synthetic", "augment": "none", "optimizer": "sgd", "schedule": "cosine"}
    chosen |= {"loss": "cross_entropy", "trainer": "default"}
    size = 32
    if group == "experiment":
        card = yaml.safe_load((CONFIGS / group / f"{option}.yaml").read_text())
        for choice in card["defaults"]:
            name, value = next(iter(choice.items()))
            if name.removeprefix("override /") != "data" and isinstance(value, str):
                chosen[name.removeprefix("override /")] = value
        arguments = [f"experiment={option}", "data=synthetic", "data.val_fraction=0.25"]
        arguments += ["data.stored_size=null"] * (
            "stored_size" in card.get("data", {})
        )  # synthetic images have one size
    else:
        chosen[group] = option
        arguments = [f"{name}={value}" for name, value in chosen.items()]
        if group == "debug":
            arguments[-1:] = [arguments[-1], f"debug={option}"]
        arguments += ["data.val_fraction=0.25"] * (group != "debug")
    size = SIZES.get(chosen["model"], size)
    if chosen["data"] == "synthetic":
        arguments += ["data.train_samples=48", "data.test_samples=8"]
    elif chosen["data"] in ("image_folder", "imagenet"):
        arguments += ["data.root=images"]
    elif "data.download" in keys("data", chosen["data"]):
        arguments += ["data.download=false"]
    return [
        *arguments,
        f"data.image_size={size}",
        "data.batch_size=8",
        "trainer.device=cpu",
        "trainer.threads=1",
    ], chosen


def mutate(arguments: Sequence[str], chosen: dict[str, str], generator: random.Random) -> list[str]:
    """Return a command line with one to four mutations."""
    # Mostly existing keys: Hydra refuses all others before any other code runs.
    existing = sorted({key for group, option in chosen.items() for key in keys(group, option)} | TOP)
    all_keys = sorted({*existing, *options_of(TrainConfig)} - {"resume"})
    targets = [key for key in existing if key.endswith("_target_")]
    result = list(arguments)
    for _ in range(generator.choice((1, 1, 1, 1, 2, 2, 3, 4))):
        key, value = generator.choice(existing if generator.random() < 0.9 else all_keys), generator.choice(VALUES)
        kind = generator.random()
        if key.endswith("_target_") or kind < 0.05:
            key = key if key.endswith("_target_") else generator.choice(targets)
            result.append(f"{key}={generator.choice((*TARGETS, value))}")
        elif kind < 0.75:
            result.append(f"{key}={value}")
        elif kind < 0.79:
            result.append(f"{generator.choice(('+', '++'))}{key}={value}")
        elif kind < 0.84:
            position = generator.randrange(len(key))
            letters = generator.choice(("", "x", ".", "_", "é", key[position] * 2))
            result.append(f"{generator.choice(('', '+', '++'))}{key[:position]}{letters}{key[position + 1 :]}={value}")
        elif kind < 0.89:
            result.append(f"~{key}")
        elif kind < 0.97:
            group = generator.choice(GROUPS)
            option = generator.choice((*options(group), *options(group), generator.choice(VALUES)))
            result.append(f"{group}={option}")
        else:
            result.append(
                generator.choice((value, f"={value}", f"{key}=", key, f"--{key}", f"~{key}={value}", f"-{value}"))
            )
    return result


def fuzzed_command_lines(count: int, seed: int = SEED) -> Iterator[list[str]]:
    """Yield mutated command lines, for each option of each group in turn."""
    generator = random.Random(seed)
    pairs = [(group, option) for group in GROUPS for option in options(group)]
    generator.shuffle(pairs)
    for number in range(count):
        yield mutate(*base(*pairs[number % len(pairs)]), generator)


@dataclass(frozen=True)
class Outcome:
    """Result of a case; a negative code is a signal number."""

    arguments: list[str]
    code: int
    error: str
    remaining_files: list[str]
    seconds: float

    @property
    def fault(self) -> str | None:
        """Return a description of the fault, or None."""
        has_valid_error = self.error == "" if self.code == 0 else LINE.fullmatch(self.error)
        if (
            self.code not in (0, 2, 3, 4, 5, 6, 7)
            or not has_valid_error
            or self.remaining_files
            or self.seconds > SECONDS
        ):
            files = f"files {self.remaining_files}\n  {self.arguments}\n  {self.error}"
            return f"exit {self.code} in {self.seconds:.1f} s, {files}"
        return None


def build_everything(config: Config) -> None:
    """Build all objects that training builds before it creates the run folder."""
    trainer.build.training.build(config)


def run_main(config: Config) -> None:
    """Call `_main`: `launch` needs an importable function, and `_main` may not be importable."""
    _main(config)


_main: Callable[[Config], object] = build_everything


def on_meta(patched: pytest.MonkeyPatch) -> None:
    """Patch the builder to create and check models on the meta device, then give them uninitialised memory."""
    modules = trainer.build.training
    build_model, check_model, check_training = modules.build_model, modules.check_model, modules.check_training

    def build(*arguments: Any, **options: Any) -> nn.Module:
        with torch.device("meta"):
            return build_model(*arguments, **options)

    def check(model: nn.Module, values: dict[str, Any]) -> None:
        with torch.device("meta"):
            check_model(model, values)
        model.to_empty(device="cpu")

    def check_batches(model: nn.Module, values: dict[str, Any], images: Sequence[torch.Tensor]) -> None:
        check_training(model.to("meta"), values, [batch.to("meta") for batch in images])
        model.to_empty(device="cpu")

    patched.setattr(trainer.build.training, "build_model", build)
    patched.setattr(trainer.build.training, "check_model", check)
    patched.setattr(trainer.build.training, "check_training", check_batches)


def outcomes(cases: Sequence[list[str]], main: Callable[[Config], object], base_folder: Path) -> list[Outcome]:
    """Run each command line in a separate fork, two at a time, and return the outcomes."""
    running: dict[int, tuple[int, float]] = {}
    done: dict[int, tuple[int, float]] = {}
    for number, arguments in enumerate(cases):
        if len(running) == 2:
            wait(running, done)
        folder = base_folder / str(number)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            run_and_exit(arguments, main, folder, base_folder / f"{number}.stderr")
        running[child] = (number, time.monotonic())
    while running:
        wait(running, done)
    return [
        Outcome(
            arguments,
            done[number][0],
            (base_folder / f"{number}.stderr").read_text(),
            sorted(path.name for path in (base_folder / str(number)).iterdir()),
            done[number][1],
        )
        for number, arguments in enumerate(cases)
    ]


def wait(running: dict[int, tuple[int, float]], done: dict[int, tuple[int, float]]) -> None:
    child, status = os.wait()
    number, start = running.pop(child)
    done[number] = (os.waitstatus_to_exitcode(status), time.monotonic() - start)


def run_and_exit(arguments: list[str], main: Callable[[Config], object], folder: Path, error: Path) -> None:
    """Run one command line in a forked process and exit with its exit code."""
    global _main
    _main = main
    code = 99
    try:
        signal.alarm(3 * SECONDS)
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        warnings.resetwarnings()
        sys.argv = ["scripts/train.py", *arguments]
        try:
            launch(f"{__name__}.run_main", config_name="train", schema=TrainConfig)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        sys.stderr.flush()
    finally:
        os._exit(code)


@pytest.fixture
def bounded(monkeypatch):
    """Exclude weights, network access and the user's data."""

    def unreachable(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("no network in a test")

    on_meta(monkeypatch)
    if hasattr(yaml, "CSafeLoader"):  # composing takes most of the time
        monkeypatch.setattr(yaml, "SafeLoader", yaml.CSafeLoader)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.delenv("PRECEPTOR_DATA", raising=False)
    # Run once here: otherwise each fork spends seconds on late imports of torch and Hydra.
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", *base("augment", "rand_augment")[0]])
    launch(f"{__name__}.build_everything", config_name="train", schema=TrainConfig)


def test_unmutated_command_line_of_every_option_is_valid(bounded, tmp_path, full):
    """Fuzzing starts from valid command lines, so that only the mutations cause errors."""
    cases = [base(group, option)[0] for group in GROUPS for option in options(group)]
    for outcome in outcomes(cases if full else cases[::16], build_everything, tmp_path):
        assert outcome.fault is None, outcome.fault
        assert outcome.code == 0 or (outcome.code == 3 and "data=synthetic" not in outcome.arguments), outcome


def test_fuzzed_command_lines_give_at_most_one_line_and_an_exit_code(bounded, tmp_path, full, promise):
    count = 2000 if full else 120
    results = outcomes(list(fuzzed_command_lines(count)), build_everything, tmp_path)
    faults = [outcome.fault for outcome in results if outcome.fault]
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults)
    codes = Counter(outcome.code for outcome in results)
    assert codes[0] > count / 50 and codes[2] > count / 3  # neither all refused nor all accepted
    summary = ", ".join(f"{number} x exit {code}" for code, number in sorted(codes.items()))
    promise(10, "Every bad input gets one useful line", f"{count:,} fuzzed configs: {summary}; none exit 1")


@pytest.mark.parametrize(
    "broken",
    [
        lambda config: [][config.values["seed"]],
        lambda config: int("x"),
        lambda config: print("Traceback (most recent call last):", file=sys.stderr),
        lambda config: Path("litter").write_text(""),
        lambda config: os.kill(os.getpid(), signal.SIGKILL),
    ],
    ids=["exception", "ValueError", "words", "litter", "crash"],
)
def test_fuzz_detects_internal_errors_and_tracebacks(bounded, tmp_path, broken):
    results = outcomes([base("model", "mlp")[0]], broken, tmp_path)
    assert results[0].fault
