"""Every combination of features: a run that is stopped at any step ends bit-identical to an uninterrupted one.

    row of the matrix = one choice per factor (optimizer, schedule, ...), each switch (EMA, clipping, ...) on or off

Each option occurs at least twice, and each two switches in all four combinations. Options are read from configs/ and
keys from the schema, so that a feature which is missing in the matrix makes a test fail.
"""

import itertools
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import built, composed, last_state, packed, reopened, run_to_end, trained
from PIL import Image

from core.config import CONFIGS, leaves
from core.errors import NumericalError, StopSignal
from core.options.declarations import TrainConfig
from core.options.schema import options_of
from core.seeding import fold
from trainer.run import Run
from trainer.snapshot import Snapshot
from trainer.storage.checkpoint import CheckpointFolder

pytestmark = pytest.mark.thorough

Row = Mapping[str, str]  # factor or switch -> choice
GROUPS = ("optimizer", "schedule", "augment", "loss")


def options(group: str) -> list[str]:
    """Return the options of a config group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml") if not path.stem.startswith("_"))


def allowed(key: str) -> list[str]:
    """Return the allowed values of a key, from the text of its rule."""
    return str(options_of(TrainConfig)[key].rule(None)).removeprefix("must be one of ").split(", ")


# The factors


def pairs_of_augmentations() -> dict[str, tuple[str, ...]]:
    """Return pairs of neighbouring options. torchvision's, named *_augment, come first: they accept only uint8."""
    names = options("augment")
    pairs = [sorted(pair, key=lambda name: not name.endswith("_augment")) for pair in pairwise([*names, names[0]])]
    return {" ".join(pair): (f"augment=[{','.join(pair)}]",) for pair in pairs}


OPTIMIZERS = {
    "rmsprop": ("optimizer.momentum=0.9", "optimizer.centered=true", "optimizer.lr=0.001"),
    "adagrad": ("optimizer.initial_accumulator_value=0.1", "optimizer.lr_decay=0.01"),
    "muon": ("optimizer.adamw_lr=0.01",),
}
SCHEDULES = {
    "plateau": ("schedule.factor=0.5", "schedule.patience=1", "schedule.min_delta=9"),
    "torch MultiStepLR": ("schedule._target_=torch.optim.lr_scheduler.MultiStepLR", "+schedule.milestones=[1,2]"),
    "torch OneCycleLR": (
        *("schedule._target_=torch.optim.lr_scheduler.OneCycleLR", "~schedule.gamma", "schedule.interval=step"),
        *("+schedule.max_lr=0.05", "+schedule.total_steps=40"),
    ),
}
STOPS = {  # a long run has 18 steps and is stopped early; all others have about 12
    "max_epochs": ("trainer.max_epochs={epochs}",),
    "max_steps": ("trainer.max_epochs={long}", "trainer.max_steps=11"),
    "patience": (
        *("trainer.max_epochs={long}", "trainer.early_stopping.patience={half}"),
        *("trainer.early_stopping.min_delta=9", "trainer.early_stopping.monitor=val/loss"),
    ),
    "geometric": (
        *("trainer.max_epochs={long}", "trainer.early_stopping.patience={epochs}", "trainer.early_stopping.mode=min"),
        *("trainer.early_stopping.geometric=1.5", "trainer.early_stopping.min_delta=9"),
    ),
}
FACTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "optimizer": {name: (f"optimizer={name}", *OPTIMIZERS.get(name, ())) for name in options("optimizer")},
    "schedule": {
        name: (f"schedule={name.split()[0]}", *SCHEDULES.get(name, ()))
        for name in sorted({*options("schedule"), *SCHEDULES})
    },
    "augment": pairs_of_augmentations(),
    "loss": {name: (f"loss={name}",) for name in options("loss")},
    "precision": {name: (f"trainer.precision={name}",) for name in allowed("trainer.precision") if name != "fp16"},
    "normalise": {name: (f"data.normalise={name}",) for name in allowed("data.normalise")},
    "model": {
        "mlp": ("model=mlp", "model.hidden=[16]"),
        "resnet": ("model=resnet20", "model.depths=[1,1]", "model.widths=[4,8]"),
        "airbench": ("model=airbench", "model.widths=[4,8]", "trainer.freeze_after={{whiten: 5 steps}}"),
        "heads": ("model=mlp", "model._target_=test_losses.WithHeads", "loss.auxiliary_weight=0.5"),
    },
    "stop": STOPS,
}
SWITCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # off, on
    "dropout": ((), ("model.dropout=0.3",)),
    "batch_norm": ((), ("model.batch_norm=true",)),
    "files": (("data=synthetic",), ("data=image_folder", "data.memory_budget=0", "data.root={images}")),
    "colour": (("data.channels=1",), ("data.channels=3",)),
    "drop_last": ((), ("data.drop_last=true",)),
    "accumulate": ((), ("trainer.accumulate=2",)),
    "tta": ((), ("trainer.tta=mirror",)),
    "ema": ((), ("trainer.ema_decay=0.9",)),
    "lookahead": (
        (),
        ("trainer.lookahead.every=3", "trainer.lookahead.decay=0.5", "trainer.lookahead.power=1"),
    ),
    "clip_norm": ((), ("trainer.clip_norm=0.5",)),
    "l1": ((), ("trainer.l1=0.001",)),
    "weight_decay": (("optimizer.weight_decay=0",), ("optimizer.weight_decay=0.01",)),
    "weight_decay_on": ((), ("trainer.weight_decay_on=weights", "trainer.bias_lr_factor=4")),
    "label_smoothing": ((), ("loss.label_smoothing=0.1",)),
    "class_weights": ((), ("loss.class_weights=balanced",)),
    "warm_up": ((), ("schedule.warmup_epochs=0.5",)),
    "channels_last": (("trainer.channels_last=false",), ("trainer.channels_last=true",)),
    "deterministic": ((), ("trainer.deterministic=true",)),
    "on_nonfinite": ((), ("trainer.on_nonfinite=skip",)),
    "every_steps": ((), ("trainer.checkpoint.every_steps=2", "trainer.checkpoint.keep=null")),
    "evaluate_every": ((), ("trainer.evaluate_every=2 steps",)),
    "best": ((), ("trainer.checkpoint.monitor=train/loss", "trainer.checkpoint.mode=min")),
    "log_every": ((), ("trainer.log_every=3 steps", "trainer.histograms_every=5 steps")),
}
CHOICES = {factor: list(choices) for factor, choices in FACTORS.items()} | {name: ["off", "on"] for name in SWITCHES}


def is_possible(row: Row) -> bool:
    """Return whether these choices, possibly of some factors only, can be combined."""
    model, schedule, optimizer = (row.get(factor, "") for factor in ("model", "schedule", "optimizer"))
    return not (
        (model in ("resnet", "airbench", "heads") and row.get("dropout") == "on")
        or (model in ("resnet", "airbench") and row.get("batch_norm") == "off")  # these models always have batch norm
        or (model == "heads" and row.get("batch_norm") == "on")
        or (model in ("resnet", "airbench") and row.get("normalise") == "pca")
        or (schedule.startswith("torch") and row.get("warm_up") == "on")
        or (
            schedule == "torch OneCycleLR" and optimizer in ("adagrad", "muon")
        )  # these have no momentum that torch can schedule
    )


Pair = frozenset[tuple[str, str]]  # two switches, or a switch and an option


def possible_pairs() -> set[Pair]:
    """Return all pairs that can be combined."""
    pairs = set()
    for name, other_name in itertools.combinations(CHOICES, 2):
        if name in SWITCHES or other_name in SWITCHES:
            choices = itertools.product(CHOICES[name], CHOICES[other_name])
            pairs |= {
                frozenset(pair.items())
                for first, second in choices
                if is_possible(pair := {name: first, other_name: second})
            }
    return pairs


def covering_rows() -> list[Row]:
    """Return a covering array: greedily add rows around a missing pair until none is left (AETG, Cohen et al. 1997)."""
    generator = random.Random(0)  # of the first 20 seeds, the one with the fewest rows
    missing = possible_pairs()
    rows: list[Row] = []
    while missing:
        start = generator.choice(sorted(map(sorted, missing)))
        if row := completed(dict(start), missing, generator):
            rows.append(row)
            missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
    return rows


def completed(row: dict[str, str], missing: Collection[Pair], generator: random.Random) -> Row | None:
    """Complete a row in random order of the factors, each with the choice that covers the most missing pairs."""

    def gain(item: tuple[str, str]) -> tuple[int, float]:
        return sum(frozenset((item, other_item)) in missing for other_item in row.items()), generator.random()

    for factor in generator.sample([factor for factor in CHOICES if factor not in row], len(CHOICES) - 2):
        items = [(factor, choice) for choice in CHOICES[factor] if is_possible({**row, factor: choice})]
        if not items:
            return None
        row |= [max(items, key=gain)]
    return row


ROWS = covering_rows()
NO_WORKERS = "data.num_workers=0"


def overrides(row: Row, image_root: Path) -> tuple[str, ...]:
    """Return the overrides that a user would type for a row, without the number of workers."""
    data_overrides = ["data.image_size=8", "data.batch_size=8", "data.val_fraction=0.2"]
    if row["files"] == "off":
        data_overrides += ["data.train_samples=55", "data.test_samples=16", "data.num_classes=4"]
    if row["schedule"] == "one_cycle" and row["optimizer"] == "adagrad":
        data_overrides += ["schedule.momentum=null"]
    epochs = 4 if row["accumulate"] == "on" else 2
    groups = [FACTORS[factor][row[factor]] for factor in FACTORS]
    built_in = {"batch_norm"} if row["model"] in ("resnet", "airbench") else set()  # always on, without a key
    groups += [SWITCHES[name][row[name] == "on"] for name in SWITCHES if name not in built_in]
    values = {"images": image_root, "epochs": epochs, "half": epochs // 2, "long": epochs * 3 // 2}
    return tuple(text.format(**values) for text in itertools.chain(*groups, data_overrides))


def row_name(row: Row) -> str:
    return " ".join(row[factor] for factor in FACTORS)


@pytest.fixture(scope="module")
def image_root(tmp_path_factory) -> Path:
    """Return a folder of small PNGs whose training split is as large as that of the synthetic data."""
    folder = tmp_path_factory.mktemp("data") / "images"
    generator = np.random.default_rng(0)
    for index in range(69):
        path = folder / f"class {index % 4}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(autouse=True, scope="module")
def _restore_deterministic_flag() -> Iterator[None]:
    """Reset torch's process-wide flag, which some rows set."""
    yield
    torch.use_deterministic_algorithms(False)


# Coverage of the matrix, counted from the overrides and not from the construction of the rows

SELECTS_SAMPLES = "selects the samples before the first step; a checkpoint contains their fingerprint"
DRAWS_IMAGES = "draws images before the first step"
EXCLUDED = {
    "data.download": SELECTS_SAMPLES,
    "data.val_fraction": SELECTS_SAMPLES,
    "data.limit_train": SELECTS_SAMPLES,
    "data.limit_eval": SELECTS_SAMPLES,
    "data.image_size": SELECTS_SAMPLES,
    "data.fit": SELECTS_SAMPLES,
    "data.bits": "decides how files of 16 bits are decoded, before the first step",
    "data.mirror": "decides about a warning only",
    "data.batch_size": "the same loop at every size; the rows have full, half and accumulated batches",
    "data.num_workers": "changes at resumes of rows with files or a torchvision transform",
    "data.stored_size": "decides which pixels the augmentation gets, as the size of a file does",
    "data.timeout_s": "ends a run or has no effect",
    "data.whitening_epsilon": "a constant of the normalisation; the normalisation is varied",
    "trainer.max_minutes": "depends on the wall clock: not reproducible",
    "trainer.threads": "another number of threads changes the last bits",
    "trainer.device": "cuda: tested separately below and in tests/test_cuda.py",
    "trainer.tf32": "only on cuda: tests/test_cuda.py",
    "trainer.compile": "compiles for minutes; the compiled model has no state, the plain model is saved",
    "trainer.cuda_graphs": "only on cuda: tests/test_cuda.py",
    "trainer.log_graph": DRAWS_IMAGES,
    "trainer.log_images": DRAWS_IMAGES,
}


def rare(rows: Sequence[Collection[str]], offered: Mapping[str, Collection[str]]) -> set[str]:
    """Return the options that occur in fewer than two rows."""
    count: Counter[str] = Counter()
    for row in rows:
        for override in row:
            group, _, names = override.partition("=")
            count.update(f"{group}={name}" for name in names.strip("[]").split(","))
    return {f"{group}={name}" for group, names in offered.items() for name in names if count[f"{group}={name}"] < 2}


def constant(configs: Sequence[Mapping[str, Any]], keys: Collection[str]) -> set[str]:
    """Return the keys that have the same value in all rows."""
    return {key for key in keys if len({repr(config.get(key)) for config in configs}) == 1}


@pytest.fixture(scope="module")
def row_overrides(image_root) -> list[tuple[str, ...]]:
    return [(*overrides(row, image_root), NO_WORKERS) for row in ROWS]


OFFERED = {group: options(group) for group in GROUPS} | {
    "trainer.precision": [name for name in allowed("trainer.precision") if name != "fp16"],
    "data.normalise": allowed("data.normalise"),
}


def test_each_option_occurs_in_at_least_two_rows(row_overrides):
    assert {len(names) > 1 for names in OFFERED.values()} == {True}
    assert rare(row_overrides, OFFERED) == set()
    assert min(Counter(row[factor] for row in ROWS)[name] for factor in FACTORS for name in FACTORS[factor]) >= 2


def test_each_two_switches_occur_in_all_four_combinations():
    for first, second in itertools.combinations(SWITCHES, 2):
        assert len({(row[first], row[second]) for row in ROWS}) == 4, (first, second)


def test_each_option_occurs_with_each_switch_on_and_off():
    for factor, name in itertools.product(FACTORS, SWITCHES):
        for choice in FACTORS[factor]:
            states = {row[name] for row in ROWS if row[factor] == choice}
            assert states == {state for state in ("off", "on") if is_possible({factor: choice, name: state})}, (
                choice,
                name,
            )


def test_each_key_is_varied_or_excluded(row_overrides):
    configs = [dict(leaves(composed(*row).values)) for row in row_overrides]
    keys = [
        key for key in options_of(TrainConfig) if key.partition(".")[0] in ("data", "trainer", *GROUPS) and "." in key
    ]
    assert constant(configs, keys) == set(EXCLUDED)
    # A feature that is missing in the matrix:
    assert constant(configs, [*keys, "trainer.sam"]) == {*EXCLUDED, "trainer.sam"}
    assert rare(row_overrides, {"optimizer": [*options("optimizer"), "lion"]}) == {"optimizer=lion"}
    rows = [row for row in row_overrides if "optimizer=muon" not in row] + [("optimizer=muon",)]
    assert rare(rows, {"optimizer": ["muon", "sgd"]}) == {"optimizer=muon"}


# Stopped and resumed

WORKERS = ((0, 1), (1, 2), (2, 0))  # before and after the resume
REASONS = {"patience": "early_stopping", "geometric": "early_stopping"}


class Uninterrupted(NamedTuple):
    """An uninterrupted run."""

    folder: Path
    start: Snapshot
    end: Snapshot
    state: Any  # reference for stopped runs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, image_root) -> Callable[[int], Uninterrupted]:
    """Return a function that returns the uninterrupted run of a row; each run is cached."""

    @cache
    def run(number: int) -> Uninterrupted:
        run = built(tmp_path_factory.mktemp("uninterrupted") / "run", *overrides(ROWS[number], image_root), NO_WORKERS)
        checkpoints = run.folder.checkpoints
        start = checkpoints.load("last")[0]
        run_to_end(run)
        return Uninterrupted(run.folder.path, start, checkpoints.load("last")[0], last_state(run.folder.path))

    return run


def stopped(folder: Path, step: int, *overrides: str) -> Run:
    """Return a run stopped at this step by SIGTERM, sent during the forward pass of the step's first batch."""
    run = built(folder, *overrides)

    def stop(*_: Any) -> None:
        if run.state.model.training and run.state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    run.state.model.register_forward_hook(stop)
    with pytest.raises(StopSignal):
        run_to_end(run)
    assert run.state.step == step
    return run


def resume_to_end(folder: Path, *overrides: str) -> Any:
    """Resume a run, train it to its end and return its last state."""
    run = reopened(folder, "trust=[test_losses]", *overrides)
    assert run is not None
    run_to_end(run)
    return last_state(folder)


STOPPED: dict[int, list[tuple[int, bool, bool]]] = {}  # row -> (step, at the end of an epoch, with accumulation)


@pytest.mark.parametrize("number", range(len(ROWS)), ids=lambda number: f"{number} {row_name(ROWS[number])}")
def test_run_stopped_at_any_step_ends_bit_identically(tmp_path, uninterrupted, image_root, full, number):
    row = ROWS[number]
    state, values, lines = uninterrupted(number).state
    steps = values["step"]
    assert values["summary"]["stop_reason"] == REASONS.get(row["stop"], row["stop"])
    assert 8 <= steps <= 12 and len(lines) >= 2
    in_workers = row["files"] == "on" or "_augment" in row["augment"]
    STOPPED[number] = []
    for step in range(1, steps + 1) if full else {1 + number % steps, 1 + (5 * number + 6) % steps}:
        # Starting processes takes most of the time, so only some steps use workers.
        workers_before, workers_after = WORKERS[number % 3] if in_workers and (number + step) % 4 == 0 else (0, 0)
        folder = tmp_path / str(step)
        run = stopped(folder, step, *overrides(row, image_root), f"data.num_workers={workers_before}")
        resumed = resume_to_end(folder, f"data.num_workers={workers_after}")
        assert resumed[1:] == (values, lines), step
        assert resumed[0] == state, step
        at_end = step % run.training.train_loader.steps_per_epoch == 0
        STOPPED[number].append((step, at_end, row["accumulate"] == "on"))


def test_stops_cover_every_step(promise):
    if len(STOPPED) < len(ROWS):
        pytest.skip("needs all rows in the same session")
    stops = [stop for row in STOPPED.values() for stop in row]
    assert {step for step, _, _ in stops} == set(range(1, 13))
    for index in (1, 2):
        assert {stop[index] for stop in stops} == {True, False}
    promise(3, "Resume is exact for every feature", f"{len(ROWS)} combinations, {len(stops)} stops: all identical")


FP16 = (
    *("trainer.device=cuda", "trainer.precision=fp16", "trainer.deterministic=true", "data=image_folder", NO_WORKERS),
    *("data.memory_budget=0", "data.image_size=8", "data.channels=3", "data.batch_size=8", "data.val_fraction=0.2"),
    *("model=resnet20", "model.depths=[1,1]", "model.widths=[4,8]", "optimizer=adamw", "schedule=one_cycle"),
    *("augment=[crop_flip,affine,mixup]", "trainer.ema_decay=0.9", "trainer.accumulate=2", "trainer.max_epochs=4"),
    *("trainer.clip_norm=0.5", "trainer.l1=0.001", "trainer.log_every=3 steps"),
)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_run_stopped_at_any_step_ends_bit_identically(tmp_path, image_root, full):
    """A row on CUDA; the compared state includes the gradient scaler."""
    fp16_overrides = (*FP16, f"data.root={image_root}")
    state = last_state(trained(tmp_path / "uninterrupted", *fp16_overrides).folder.path)
    for step in range(1, 13) if full else (1, 6, 7):
        stopped(tmp_path / str(step), step, *fp16_overrides)
        assert resume_to_end(tmp_path / str(step)) == state, step


def test_results_do_not_depend_on_the_worker_count(tmp_path, image_root, full, promise):
    """Files with a torchvision transform, mixing and dropout, read into memory or streamed.

    The number of workers of streamed runs also changes at the resume.
    """
    run_overrides = (
        *("data=image_folder", f"data.root={image_root}", "data.image_size=8", "data.channels=3", "data.batch_size=8"),
        *("data.val_fraction=0.2", "augment=[trivial_augment,crop_flip,mixup]", "model.dropout=0.3"),
    )
    streamed = (*run_overrides, "data.memory_budget=0")
    states = [last_state(trained(tmp_path / "in memory", *run_overrides, NO_WORKERS).folder.path)]
    for count in (0, 1, 2):
        run = trained(tmp_path / str(count), *streamed, f"data.num_workers={count}")
        states.append(last_state(run.folder.path))
    for workers_before, workers_after in itertools.permutations((0, 1, 2), 2) if full else ((0, 2), (2, 1)):
        for step in (3, 6, 8) if full else (3,):
            folder = tmp_path / f"{workers_before} {workers_after} {step}"
            stopped(folder, step, *streamed, f"data.num_workers={workers_before}")
            states.append(resume_to_end(folder, f"data.num_workers={workers_after}"))
    assert states == states[:1] * len(states)
    measurement = f"0, 1, 2 workers, and another number after a resume: {len(states)} runs, all identical"
    promise(4, "Results do not depend on the worker count", measurement)


# Mutants: the comparison must detect each of them

DIVIDED = {"schedule", "early_stopping", "sums", "scaler"}  # plain values, removed one by one
PIECES = (
    *("model", "ema", "lookahead", "step", "evaluated", "best", "sums.window", "sums.total", "sums.first"),
    *("early_stopping.best", "early_stopping.best_epoch", "early_stopping.epoch"),
    *("schedule.current", "schedule.best", "schedule.waited", "schedule.scheduler", "schedule.groups"),
    *("optimizer.momentum_buffer", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step"),
    *("optimizer.square_avg", "optimizer.grad_avg", "optimizer.sum"),
)
NO_PIECES = {
    "clock": "the wall clock",
    "config": "compared with config.yaml on resume: tests/test_options.py",
    "early_stopping.monitor": "a function of the config; compared on resume: tests/test_options.py",
    "early_stopping.mode": "a function of the config; compared on resume: tests/test_options.py",
    "format": "the format of the file",
    "steps_per_epoch": "a function of data and config: compared on resume",
    "data": "a function of the data: the same at each start on the same machine",
    "guard": "how many steps were skipped in a row: tests/test_trainer.py",
    "optimizers": "plain values; no optimizer in the matrix has any",
}


def piece_of(tensor: str) -> str:
    prefix = tensor.partition(".")[0]
    return prefix if prefix in ("model", "ema", "lookahead", "data") else f"{prefix}.{tensor.rpartition('.')[2]}"


def pieces(snapshot: Snapshot) -> set[str]:
    """Return the names of a snapshot's pieces: `ema`, `optimizer.exp_avg`, `early_stopping.best_epoch`, ..."""
    plain = {f"{section}.{key}" for section in DIVIDED for key in snapshot.values[section]}
    return {piece_of(name) for name in snapshot.tensors} | plain | (set(snapshot.values) - DIVIDED)


def without(snapshot: Snapshot, piece: str, start: Snapshot) -> Snapshot:
    """Return a snapshot with one piece reset to step 0, as if loading skipped it; `step` is reduced by 1 instead."""
    tensors = {
        name: start.tensors.get(name, torch.zeros_like(tensor)) if piece_of(name) == piece else tensor
        for name, tensor in snapshot.tensors.items()
    }
    section, _, key = piece.partition(".")
    values = dict(snapshot.values)
    if piece == "step":
        values["step"] -= 1
    elif section in DIVIDED and key in values[section]:
        values[section] = {**values[section], key: start.values[section][key]}
    elif piece in values:
        values[piece] = start.values[piece]
    return Snapshot(tensors, values)


def test_every_piece_of_state_has_a_mutant(uninterrupted):
    names = set().union(*(pieces(uninterrupted(number).end) for number in range(len(ROWS))))
    assert names == {*PIECES, *NO_PIECES}


@pytest.fixture(scope="module")
def halted(tmp_path_factory, uninterrupted, image_root) -> Callable[[int, int], Path]:
    """Return a function (row, step) -> folder of the run stopped there; at the last step, killed before its summary."""

    @cache
    def make(number: int, step: int) -> Path:
        folder = tmp_path_factory.mktemp("halted") / "run"
        if step == uninterrupted(number).end.step:
            shutil.copytree(uninterrupted(number).folder, folder)
            (folder / "summary.json").unlink()
            return folder
        stopped(folder, step, *overrides(ROWS[number], image_root), NO_WORKERS)
        return folder

    return make


@pytest.mark.parametrize("piece", PIECES)
def test_resume_that_skips_a_piece_of_state_is_detected(tmp_path, uninterrupted, halted, piece):
    for number in range(len(ROWS)):
        _, start, end, state = uninterrupted(number)
        for step in (5, 7, end.step) if piece in pieces(end) else ():
            folder = tmp_path / f"{number} {step}"
            shutil.copytree(halted(number, step), folder)
            checkpoints = CheckpointFolder(folder / "checkpoints")
            snapshot = checkpoints.load("last")[0]
            mutant = without(snapshot, piece, start)
            if packed(mutant) == packed(snapshot):
                continue  # the piece has not changed at this step
            for file in checkpoints.files("last", "step"):
                file.path.unlink()
            checkpoints.save(["last"], mutant, keep={})
            try:
                resumed_state = resume_to_end(folder)
            except NumericalError:  # RMSprop without its squared averages
                resumed_state = None
            if resumed_state != state:
                return
    pytest.fail("no row detects it")


SEEDS = {
    "trainer.loop.fold": {"dropout": "on"},
    "data.loading.loaders.fold": {},
    "data.augment.pipeline.fold": {"augment": "crop_flip cutmix"},
}


@pytest.mark.parametrize("function", SEEDS)
def test_random_values_of_the_previous_step_are_detected(tmp_path, monkeypatch, uninterrupted, halted, function):
    """After the resume, random values are drawn for the previous step or epoch."""
    number = next(number for number, row in enumerate(ROWS) if SEEDS[function].items() <= row.items())

    def fold_previous(seed: int, *names: int | str) -> int:
        return fold(seed, *(name - 1 if isinstance(name, int) else name for name in names))

    folders = [shutil.copytree(halted(number, 7), tmp_path / name) for name in ("correct", "mutant")]
    assert resume_to_end(folders[0]) == uninterrupted(number).state
    monkeypatch.setattr(function, fold_previous)
    assert resume_to_end(folders[1]) != uninterrupted(number).state


def test_dropout_without_reseeding_is_detected(tmp_path, monkeypatch, uninterrupted, halted):
    number = next(number for number, row in enumerate(ROWS) if row["dropout"] == "on")
    folder = shutil.copytree(halted(number, 7), tmp_path / "run")
    monkeypatch.setattr("trainer.loop.reseed", lambda *_: None)
    assert resume_to_end(folder) != uninterrupted(number).state
