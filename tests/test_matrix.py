"""Every feature beside every other: a run that was stopped at any step ends bit-identical to one that was not.

    row of the matrix = a choice of each factor (optimizer, schedule, ...), each switch (EMA, clipping, ...) on or off

Each option occurs at least twice, and each two switches in all four ways. Options are read from configs/ and keys from
the schema, so that a feature which is not in the matrix makes a test fail.
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

Row = Mapping[str, str]  # factor or switch -> the choice
GROUPS = ("optimizer", "schedule", "augment", "loss")


def options(group: str) -> list[str]:
    """What a config group offers."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml") if not path.stem.startswith("_"))


def allowed(key: str) -> list[str]:
    """The values of a key that is one of a few, as its rule tells them."""
    return str(options_of(TrainConfig)[key].rule(None)).removeprefix("must be one of ").split(", ")


# The factors


def pairs_of_augmentations() -> dict[str, tuple[str, ...]]:
    """Each option with its neighbours; torchvision's, whose names end so, come first, as they take uint8 alone."""
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
STOPS = {  # a long run has 18 steps, and is stopped early; the rest have about 12
    "max_epochs": ("trainer.max_epochs={epochs}",),
    "max_steps": ("trainer.max_epochs={long}", "trainer.max_steps=11"),
    "patience": (
        *("trainer.max_epochs={long}", "trainer.early_stopping.patience={half}"),
        *("trainer.early_stopping.min_delta=9", "trainer.early_stopping.monitor=val/accuracy"),
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
    "network": {
        "mlp": ("model=mlp", "model.hidden=[16]"),
        "resnet": ("model=resnet20", "model.depths=[1,1]", "model.widths=[4,8]"),
        "airbench": ("model=airbench", "model.widths=[4,8]"),
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


def possible(row: Row) -> bool:
    """Whether these choices, perhaps not of every factor, go together."""
    network, schedule, optimizer = (row.get(factor, "") for factor in ("network", "schedule", "optimizer"))
    return not (
        (network in ("resnet", "airbench", "heads") and row.get("dropout") == "on")
        or (network in ("resnet", "airbench") and row.get("batch_norm") == "off")  # they always have it
        or (network == "heads" and row.get("batch_norm") == "on")
        or (network in ("resnet", "airbench") and row.get("normalise") == "pca")
        or (schedule.startswith("torch") and row.get("warm_up") == "on")
        or (schedule == "torch OneCycleLR" and optimizer in ("adagrad", "muon"))  # torch finds no momentum there
    )


Pair = frozenset[tuple[str, str]]  # two switches, or a switch and an option


def pairs_wanted() -> set[Pair]:
    """All that are possible."""
    pairs = set()
    for one, other in itertools.combinations(CHOICES, 2):
        if one in SWITCHES or other in SWITCHES:
            chosen = itertools.product(CHOICES[one], CHOICES[other])
            pairs |= {
                frozenset(pair.items()) for first, second in chosen if possible(pair := {one: first, other: second})
            }
    return pairs


def covering_rows() -> list[Row]:
    """A covering array, greedily: rows around a pair that is missing, until none is (as AETG, Cohen et al. 1997)."""
    draw = random.Random(0)  # of the first 20 seeds the one with the fewest rows
    missing = pairs_wanted()
    rows: list[Row] = []
    while missing:
        start = draw.choice(sorted(map(sorted, missing)))
        if row := completed(dict(start), missing, draw):
            rows.append(row)
            missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
    return rows


def completed(row: dict[str, str], missing: Collection[Pair], draw: random.Random) -> Row | None:
    """A row's other factors, in any order, each the choice that brings most of what is missing."""

    def gain(item: tuple[str, str]) -> tuple[int, float]:
        return sum(frozenset((item, other)) in missing for other in row.items()), draw.random()

    for factor in draw.sample([factor for factor in CHOICES if factor not in row], len(CHOICES) - 2):
        items = [(factor, choice) for choice in CHOICES[factor] if possible({**row, factor: choice})]
        if not items:
            return None
        row |= [max(items, key=gain)]
    return row


ROWS = covering_rows()
NO_WORKERS = "data.num_workers=0"


def overrides(row: Row, image_root: Path) -> tuple[str, ...]:
    """What a user would type for a row, the number of workers apart."""
    given = ["data.image_size=8", "data.batch_size=8", "data.val_fraction=0.2"]
    if row["files"] == "off":
        given += ["data.train_samples=55", "data.test_samples=16", "data.num_classes=4"]
    if row["schedule"] == "one_cycle" and row["optimizer"] == "adagrad":
        given += ["schedule.momentum=null"]
    epochs = 4 if row["accumulate"] == "on" else 2
    chosen = [FACTORS[factor][row[factor]] for factor in FACTORS]
    own = {"batch_norm"} if row["network"] in ("resnet", "airbench") else set()  # they have it, and no key for it
    chosen += [SWITCHES[name][row[name] == "on"] for name in SWITCHES if name not in own]
    values = {"images": image_root, "epochs": epochs, "half": epochs // 2, "long": epochs * 3 // 2}
    return tuple(text.format(**values) for text in itertools.chain(*chosen, given))


def shown(row: Row) -> str:
    return " ".join(row[factor] for factor in FACTORS)


@pytest.fixture(scope="module")
def image_root(tmp_path_factory) -> Path:
    """A folder of small PNGs, whose training part is as large as that of the synthetic data."""
    folder = tmp_path_factory.mktemp("data") / "images"
    draw = np.random.default_rng(0)
    for index in range(69):
        path = folder / f"class {index % 4}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(autouse=True, scope="module")
def _no_traces() -> Iterator[None]:
    """Some rows set torch's flag for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


# The matrix is what it says it is: counted from what a user would type, not from how the rows were made

WHICH = "says which samples there are, before the first step; a checkpoint holds their fingerprint"
SHOWN = "draws images before the first step"
EXCLUDED = {
    "data.download": WHICH,
    "data.val_fraction": WHICH,
    "data.limit_train": WHICH,
    "data.limit_eval": WHICH,
    "data.image_size": WHICH,
    "data.fit": WHICH,
    "data.batch_size": "the same loop at every size; full and half batches occur, and accumulated ones",
    "data.num_workers": "changes at resumes of rows with files or a transform of torchvision's",
    "data.stored_size": "decides which pixels the augmentation gets, as a file's own size does",
    "data.timeout_s": "ends a run or does nothing",
    "data.whitening_epsilon": "a constant of the normalisation, which is varied",
    "trainer.max_minutes": "the wall clock's: its end is not reproducible",
    "trainer.threads": "another number gives other last bits",
    "trainer.device": "cuda has a row of its own below, and tests/test_cuda.py",
    "trainer.tf32": "of cuda alone: tests/test_cuda.py",
    "trainer.compile": "compiles for minutes; the compiled network holds no state, what is saved is the plain one",
    "trainer.log_graph": SHOWN,
    "trainer.log_images": SHOWN,
}


def rare(rows: Sequence[Collection[str]], offered: Mapping[str, Collection[str]]) -> set[str]:
    """Options that stand in fewer than two rows."""
    count: Counter[str] = Counter()
    for row in rows:
        for override in row:
            group, _, names = override.partition("=")
            count.update(f"{group}={name}" for name in names.strip("[]").split(","))
    return {f"{group}={name}" for group, names in offered.items() for name in names if count[f"{group}={name}"] < 2}


def constant(configs: Sequence[Mapping[str, Any]], keys: Collection[str]) -> set[str]:
    """Keys with one and the same value in all rows."""
    return {key for key in keys if len({repr(config.get(key)) for config in configs}) == 1}


@pytest.fixture(scope="module")
def typed(image_root) -> list[tuple[str, ...]]:
    return [(*overrides(row, image_root), NO_WORKERS) for row in ROWS]


OFFERED = {group: options(group) for group in GROUPS} | {
    "trainer.precision": [name for name in allowed("trainer.precision") if name != "fp16"],
    "data.normalise": allowed("data.normalise"),
}


def test_each_option_is_in_two_rows(typed):
    assert {len(names) > 1 for names in OFFERED.values()} == {True}
    assert rare(typed, OFFERED) == set()
    assert min(Counter(row[factor] for row in ROWS)[name] for factor in FACTORS for name in FACTORS[factor]) >= 2


def test_each_two_switches_occur_in_all_four_ways():
    for one, other in itertools.combinations(SWITCHES, 2):
        assert len({(row[one], row[other]) for row in ROWS}) == 4, (one, other)


def test_each_option_meets_each_switch_on_and_off():
    for factor, name in itertools.product(FACTORS, SWITCHES):
        for choice in FACTORS[factor]:
            met = {row[name] for row in ROWS if row[factor] == choice}
            assert met == {way for way in ("off", "on") if possible({factor: choice, name: way})}, (choice, name)


def test_each_key_is_varied_or_excluded(typed):
    configs = [dict(leaves(composed(*row).values)) for row in typed]
    keys = [
        key for key in options_of(TrainConfig) if key.partition(".")[0] in ("data", "trainer", *GROUPS) and "." in key
    ]
    assert constant(configs, keys) == set(EXCLUDED)
    # A feature that is not in the matrix:
    assert constant(configs, [*keys, "trainer.lookahead"]) == {*EXCLUDED, "trainer.lookahead"}
    assert rare(typed, {"optimizer": [*options("optimizer"), "lion"]}) == {"optimizer=lion"}
    once = [row for row in typed if "optimizer=muon" not in row] + [("optimizer=muon",)]
    assert rare(once, {"optimizer": ["muon", "sgd"]}) == {"optimizer=muon"}


# Stopped and resumed

WORKERS = ((0, 1), (1, 2), (2, 0))  # before and after the resume
REASONS = {"patience": "early_stopping", "geometric": "early_stopping"}


class Whole(NamedTuple):
    """An uninterrupted run."""

    folder: Path
    start: Snapshot
    end: Snapshot
    state: Any  # what others are compared with


@pytest.fixture(scope="module")
def whole(tmp_path_factory, image_root) -> Callable[[int], Whole]:
    """The uninterrupted run of a row, made once."""

    @cache
    def run(number: int) -> Whole:
        run = built(tmp_path_factory.mktemp("whole") / "run", *overrides(ROWS[number], image_root), NO_WORKERS)
        checkpoints = run.folder.checkpoints
        start = checkpoints.load("last")[0]
        run_to_end(run)
        return Whole(run.folder.path, start, checkpoints.load("last")[0], last_state(run.folder.path))

    return run


def stopped(folder: Path, step: int, *given: str) -> Run:
    """A run that SIGTERM stopped at this step, sent while its first batch was on its way through the network."""
    run = built(folder, *given)

    def stop(*_: Any) -> None:
        if run.state.model.training and run.state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    run.state.model.register_forward_hook(stop)
    with pytest.raises(StopSignal):
        run_to_end(run)
    assert run.state.step == step
    return run


def gone_on(folder: Path, *given: str) -> Any:
    """The last state of a run that is resumed."""
    run = reopened(folder, "trust=[test_losses]", *given)
    assert run is not None
    run_to_end(run)
    return last_state(folder)


STOPPED: dict[int, list[tuple[int, bool, bool]]] = {}  # row -> step, at an epoch's end, within accumulated batches


@pytest.mark.parametrize("number", range(len(ROWS)), ids=lambda number: f"{number} {shown(ROWS[number])}")
def test_stopped_at_any_step(tmp_path, whole, image_root, full, number):
    row = ROWS[number]
    state, values, lines = whole(number).state
    steps = values["step"]
    assert values["summary"]["stop_reason"] == REASONS.get(row["stop"], row["stop"])
    assert 8 <= steps <= 12 and len(lines) >= 2
    in_workers = row["files"] == "on" or "_augment" in row["augment"]
    STOPPED[number] = []
    for step in range(1, steps + 1) if full else {1 + number % steps, 1 + (5 * number + 6) % steps}:
        # New processes take longer than all the rest.
        before, after = WORKERS[number % 3] if in_workers and (number + step) % 4 == 0 else (0, 0)
        folder = tmp_path / str(step)
        run = stopped(folder, step, *overrides(row, image_root), f"data.num_workers={before}")
        again = gone_on(folder, f"data.num_workers={after}")
        assert again[1:] == (values, lines), step
        assert again[0] == state, step
        at_end = step % run.training.train_loader.steps_per_epoch == 0
        STOPPED[number].append((step, at_end, row["accumulate"] == "on"))


def test_stops_cover_every_step(promise):
    if len(STOPPED) < len(ROWS):
        pytest.skip("not all rows were run")
    stops = [stop for row in STOPPED.values() for stop in row]
    assert {step for step, _, _ in stops} == set(range(1, 13))
    for where in (1, 2):
        assert {stop[where] for stop in stops} == {True, False}
    promise(3, "Resume is exact for every feature", f"{len(ROWS)} combinations, {len(stops)} stops: all identical")


FP16 = (
    *("trainer.device=cuda", "trainer.precision=fp16", "trainer.deterministic=true", "data=image_folder", NO_WORKERS),
    *("data.memory_budget=0", "data.image_size=8", "data.channels=3", "data.batch_size=8", "data.val_fraction=0.2"),
    *("model=resnet20", "model.depths=[1,1]", "model.widths=[4,8]", "optimizer=adamw", "schedule=one_cycle"),
    *("augment=[crop_flip,affine,mixup]", "trainer.ema_decay=0.9", "trainer.accumulate=2", "trainer.max_epochs=4"),
    *("trainer.clip_norm=0.5", "trainer.l1=0.001", "trainer.log_every=3 steps"),
)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_fp16_stopped_at_any_step(tmp_path, image_root, full):
    """A row on CUDA, its scaler's state among the rest."""
    given = (*FP16, f"data.root={image_root}")
    state = last_state(trained(tmp_path / "whole", *given).folder.path)
    for step in range(1, 13) if full else (1, 6, 7):
        stopped(tmp_path / str(step), step, *given)
        assert gone_on(tmp_path / str(step)) == state, step


def test_workers_change_nothing(tmp_path, image_root, full, promise):
    """Files and a transform of torchvision's, mixed, with dropout; read at once, or by a number of workers that changes
    at the resume too."""
    given = (
        *("data=image_folder", f"data.root={image_root}", "data.image_size=8", "data.channels=3", "data.batch_size=8"),
        *("data.val_fraction=0.2", "augment=[trivial_augment,crop_flip,mixup]", "model.dropout=0.3"),
    )
    streamed = (*given, "data.memory_budget=0")
    states = [last_state(trained(tmp_path / "at once", *given, NO_WORKERS).folder.path)]
    for count in (0, 1, 2):
        run = trained(tmp_path / str(count), *streamed, f"data.num_workers={count}")
        states.append(last_state(run.folder.path))
    for before, after in itertools.permutations((0, 1, 2), 2) if full else ((0, 2), (2, 1)):
        for step in (3, 6, 8) if full else (3,):
            folder = tmp_path / f"{before} {after} {step}"
            stopped(folder, step, *streamed, f"data.num_workers={before}")
            states.append(gone_on(folder, f"data.num_workers={after}"))
    assert states == states[:1] * len(states)
    figure = f"0, 1, 2 workers, and another number after a resume: {len(states)} runs, all identical"
    promise(4, "Results do not depend on the worker count", figure)


# Mutants: what the comparison catches

DIVIDED = {"schedule", "early_stopping", "sums", "scaler"}  # plain values that are forgotten one by one
PIECES = (
    *("model", "ema", "step", "evaluated", "best", "sums.window", "sums.total"),
    *("early_stopping.best", "early_stopping.best_epoch", "early_stopping.epoch"),
    *("schedule.current", "schedule.best", "schedule.waited", "schedule.scheduler", "schedule.groups"),
    *("optimizer.momentum_buffer", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step"),
    *("optimizer.square_avg", "optimizer.grad_avg", "optimizer.sum"),
)
NO_PIECES = {
    "clock": "the wall clock's",
    "config": "compared with config.yaml on resume: tests/test_options.py",
    "early_stopping.monitor": "a function of the config; compared on resume: tests/test_options.py",
    "early_stopping.mode": "likewise",
    "format": "the file's",
    "steps_per_epoch": "a function of data and config: compared on resume",
    "data": "a function of the data: the same at each start on the same machine",
    "guard": "how many steps were skipped in a row: tests/test_trainer.py",
    "optimizers": "plain values, of which no optimizer here has any",
}


def piece_of(tensor: str) -> str:
    part = tensor.partition(".")[0]
    return part if part in ("model", "ema", "data") else f"{part}.{tensor.rpartition('.')[2]}"


def pieces(snapshot: Snapshot) -> set[str]:
    """The names of what a snapshot holds: `ema`, `optimizer.exp_avg`, `early_stopping.best_epoch`, ..."""
    plain = {f"{part}.{key}" for part in DIVIDED for key in snapshot.values[part]}
    return {piece_of(name) for name in snapshot.tensors} | plain | (set(snapshot.values) - DIVIDED)


def without(snapshot: Snapshot, piece: str, start: Snapshot) -> Snapshot:
    """A snapshot with one piece as it was at step 0, as if a load forgot it; of the step only one is forgotten."""
    tensors = {
        name: start.tensors.get(name, torch.zeros_like(tensor)) if piece_of(name) == piece else tensor
        for name, tensor in snapshot.tensors.items()
    }
    part, _, key = piece.partition(".")
    values = dict(snapshot.values)
    if piece == "step":
        values["step"] -= 1
    elif part in DIVIDED and key in values[part]:
        values[part] = {**values[part], key: start.values[part][key]}
    elif piece in values:
        values[piece] = start.values[piece]
    return Snapshot(tensors, values)


def test_every_piece_of_state_has_a_mutant(whole):
    found = set().union(*(pieces(whole(number).end) for number in range(len(ROWS))))
    assert found == {*PIECES, *NO_PIECES}


@pytest.fixture(scope="module")
def halted(tmp_path_factory, whole, image_root) -> Callable[[int, int], Path]:
    """The folder of a row's run that was stopped at a step; at the last one, killed before its summary."""

    @cache
    def make(number: int, step: int) -> Path:
        folder = tmp_path_factory.mktemp("halted") / "run"
        if step == whole(number).end.step:
            shutil.copytree(whole(number).folder, folder)
            (folder / "summary.json").unlink()
            return folder
        stopped(folder, step, *overrides(ROWS[number], image_root), NO_WORKERS)
        return folder

    return make


@pytest.mark.parametrize("piece", PIECES)
def test_a_load_that_forgets_a_piece_is_noticed(tmp_path, whole, halted, piece):
    for number in range(len(ROWS)):
        _, start, end, state = whole(number)
        for step in (5, 7, end.step) if piece in pieces(end) else ():
            folder = tmp_path / f"{number} {step}"
            shutil.copytree(halted(number, step), folder)
            checkpoints = CheckpointFolder(folder / "checkpoints")
            snapshot = checkpoints.load("last")[0]
            mutant = without(snapshot, piece, start)
            if packed(mutant) == packed(snapshot):
                continue  # at this step there is nothing to forget
            for file in checkpoints.files("last", "step"):
                file.path.unlink()
            checkpoints.save(["last"], mutant, keep={})
            try:
                again = gone_on(folder)
            except NumericalError:  # RMSprop without its squares
                again = None
            if again != state:
                return
    pytest.fail("no row would notice")


SEEDS = {
    "trainer.loop.fold": {"dropout": "on"},
    "data.loading.loaders.fold": {},
    "data.augment.pipeline.fold": {"augment": "crop_flip cutmix"},
}


@pytest.mark.parametrize("place", SEEDS)
def test_a_seed_that_is_skipped_is_noticed(tmp_path, monkeypatch, whole, halted, place):
    """After the resume, numbers are drawn for the step or epoch before."""
    number = next(number for number, row in enumerate(ROWS) if SEEDS[place].items() <= row.items())

    def late(seed: int, *names: int | str) -> int:
        return fold(seed, *(name - 1 if isinstance(name, int) else name for name in names))

    folders = [shutil.copytree(halted(number, 7), tmp_path / name) for name in ("right", "wrong")]
    assert gone_on(folders[0]) == whole(number).state
    monkeypatch.setattr(place, late)
    assert gone_on(folders[1]) != whole(number).state


def test_dropout_from_a_stream_is_noticed(tmp_path, monkeypatch, whole, halted):
    number = next(number for number, row in enumerate(ROWS) if row["dropout"] == "on")
    folder = shutil.copytree(halted(number, 7), tmp_path / "run")
    monkeypatch.setattr("trainer.loop.reseed", lambda *_: None)
    assert gone_on(folder) != whole(number).state
