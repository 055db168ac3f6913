"""Sweeps: what is drawn, what the store keeps through kills, and whole searches by the command line.

The sweeps are those of scripts/sweep.py, forked from this process, and so is the process that forks their trials: torch
is there already, and a whole search takes a second or two.
"""

import contextlib
import json
import math
import os
import pwd
import random
import runpy
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch._inductor  # noqa: F401  which each trial would import again
import yaml
from conftest import SYNTHETIC, ended, forked, last_state, reopened, run_to_end
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.trial import TrialState
from PIL import Image
from scipy import stats
from sqlalchemy import Engine, event, text

from core.composition import compose_config
from core.config import CONFIGS
from core.fork_server import ForkServer
from core.json_lines import read_lines
from core.options.declarations import SweepConfig
from sweeps.define.compose import compose_trial
from sweeps.define.plan import read_plan
from sweeps.define.space import draw, grid, overrides, read_space
from sweeps.execute import trial as trial_process
from sweeps.execute.store import Store

SWEEP_SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "sweep.py"
QUICK = (
    *(*SYNTHETIC, "model=mlp", "model.hidden=[16]", "trainer.max_epochs=3"),
    *("trainer.device=cpu", "trainer.threads=1", "trainer.early_stopping.patience=null", "sweep.pruner=none"),
)


# The command line, forked


def started(folder: Path, *arguments: str, patch: Callable[[pytest.MonkeyPatch], None] = lambda _: None) -> int:
    """scripts/sweep.py in a process of its own, its pid; what it says goes to FOLDER.out."""

    def as_daemon(server: ForkServer, control: socket.socket, parent: int, serve: Any = ForkServer._serve) -> None:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(server.errors, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), 2)
        serve(server, control, parent)

    def with_forks(patched: pytest.MonkeyPatch) -> None:  # torch is there already
        patched.setattr(ForkServer, "_execute", ForkServer._fork)
        patched.setattr(ForkServer, "_serve", as_daemon)
        patch(patched)

    return forked(SWEEP_SCRIPT, f"sweep.dir={folder}", *arguments, output=folder.with_suffix(".out"), patch=with_forks)


def swept(folder: Path, *arguments: str, within: float = 100, **named: Any) -> tuple[int, str]:
    """A sweep to its end: its exit code and what it said."""
    code = ended(started(folder, *arguments, **named), within=within)
    return code, folder.with_suffix(".out").read_text()


def trials_of(folder: Path, url: str | None = None, name: str | None = None) -> list[optuna.trial.FrozenTrial]:
    """What the store holds, read by Optuna itself."""
    storage = optuna.storages.RDBStorage(url or f"sqlite:///{folder}/sweep.db")
    try:
        return optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    finally:
        storage.engine.dispose()


def offspring(process: int) -> list[int]:
    """The processes that descend from one."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = list(children.get(process, []))
    for each in found:
        found += children.get(each, [])
    return found


LR = "sweep.space={optimizer:{lr:{log_uniform:[0.001,1.0]}}}"


def test_random_search(tmp_path):
    folder = tmp_path / "sweep"
    code, out = swept(folder, *QUICK, "sweep.trials=5", "sweep.parallel=2")
    assert code == 0, out
    trials = trials_of(folder)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5
    for trial in trials:
        run = folder / f"trial-{trial.number:04}"
        summary = json.loads((run / "summary.json").read_text())
        assert trial.value == summary["best"]["metrics"]["val/accuracy"]
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["optimizer"]["lr"] == trial.params["optimizer.lr"]
        assert config["optimizer"]["momentum"] == 1 - trial.params["1 - optimizer.momentum"]
    assert code == 0 and swept(folder, *QUICK, "sweep.trials=5", "sweep.parallel=2")[0] == 0  # nothing is left to do
    assert [trial.datetime_complete for trial in trials_of(folder)] == [trial.datetime_complete for trial in trials]


def test_signals_save_and_the_same_command_continues(tmp_path):
    """SIGTERM while trials run: exit 143, no process left, nothing lost; then bit-identical to an undisturbed run."""
    folder = tmp_path / "sweep"
    long = (*QUICK, LR, "sweep.trials=2", "sweep.parallel=2", "trainer.max_epochs=120")
    child = started(folder, *long)
    for number in range(2):  # both of them, as one that begins has children that ask git who made it
        wait_for(lambda run=folder / f"trial-{number:04}": (run / "metrics.jsonl").exists() and lines(run) > 3)
    family = offspring(child)
    assert len(family) == 3  # the server and two trials
    os.kill(child, signal.SIGTERM)
    assert ended(child) == 143
    assert not [process for process in family if Path(f"/proc/{process}").exists()]
    assert [trial.state for trial in trials_of(folder)] == [TrialState.WAITING] * 2
    stopped = json.loads((folder / "trial-0001" / "summary.json").read_text())
    assert stopped["status"] == "interrupted" and 0 < stopped["step"] < 720
    code, out = swept(folder, *long)
    assert code == 0, out
    assert swept(tmp_path / "alone", *long)[0] == 0
    for name in ("trial-0000", "trial-0001"):
        ours, theirs = (last_state(each / name) for each in (folder, tmp_path / "alone"))
        assert ours[0] == theirs[0] and ours[2] == theirs[2]


def wait_for(condition: Callable[[], bool], *, within: float = 60) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines())


def test_sweep_completes_after_repeated_kills(tmp_path, full, promise):
    """Sweeps and trials are killed; N trials end as N rows, each bit-identical to one that was undisturbed."""
    count, kills = (40, 10) if full else (6, 3)
    folder, alone = tmp_path / "sweep", tmp_path / "alone"
    arguments = (*QUICK, LR, f"sweep.trials={count}", "sweep.parallel=2", "trainer.max_epochs=12", "sweep.retries=10")
    chance, killed = random.Random(0), Counter[str]()
    enough = tmp_path / "enough"

    def patch(patched: pytest.MonkeyPatch) -> None:
        real = trial_process.train

        def train(job: Any, run: Path, *others: Any) -> Any:
            if run.name == f"trial-{count - 1:04}":  # however fast the machine, a trial is left to be killed
                wait_for(enough.exists, within=400)
            return real(job, run, *others)

        patched.setattr(trial_process, "train", train)

    while killed.total() < kills:
        child = started(folder, *arguments, patch=patch)
        while killed.total() < kills:
            wait_for(lambda child=child: len(offspring(child)) > 1)  # the server and a trial
            time.sleep(chance.uniform(0.1, 0.8))
            family = offspring(child)
            if len(family) < 2:  # it was killed just now
                continue
            victim = chance.choice(["sweep", "server", "trial"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(
                    {"sweep": child, "server": family[0], "trial": chance.choice(family[1:])}[victim], signal.SIGKILL
                )
            killed[victim] += 1
            if killed.total() == kills:
                enough.touch()
            if victim == "sweep":
                assert ended(child) == -signal.SIGKILL
                wait_for(lambda family=family: not any(is_alive(each) for each in family), within=2)
                break
        else:
            assert ended(child, within=400) == 0, folder.with_suffix(".out").read_text()
    code, out = swept(folder, *arguments, within=400)
    assert code == 0, out
    assert swept(alone, *arguments, within=400)[0] == 0
    ours, theirs = trials_of(folder), trials_of(alone)
    assert len(ours) == count and sorted(path.name for path in folder.glob("trial-*")) == [
        f"trial-{number:04}" for number in range(count)
    ]
    assert [(each.number, each.state, each.params, each.value) for each in ours] == [
        (each.number, TrialState.COMPLETE, each.params, each.value) for each in theirs
    ]
    for number in range(count):
        name = f"trial-{number:04}"
        assert last_state(folder / name)[::2] == last_state(alone / name)[::2]
    told = ", ".join(f"{number} {victim}" for victim, number in sorted(killed.items()))
    promise(20, "A sweep survives SIGKILL of itself and its trials", f"{count} of {count} results after {told} killed")


def is_alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_trial_that_always_fails(tmp_path):
    """tried again twice, told in one line at once; the others complete, and the exit code is the failure's."""
    folder = tmp_path / "sweep"

    def patch(patched: pytest.MonkeyPatch) -> None:
        real = trial_process.train

        def train(job: Any, run: Path, *others: Any) -> Any:
            if run.name == "trial-0001":
                with (folder / "tries").open("a") as file:
                    file.write("x")
                raise OSError(28, "No space left on device", str(run))
            return real(job, run, *others)

        patched.setattr(trial_process, "train", train)

    code, out = swept(folder, *QUICK, LR, "sweep.trials=3", patch=patch)
    assert code == 5
    assert (folder / "tries").read_text() == "xxx"
    assert [trial.state.name for trial in trials_of(folder)] == ["COMPLETE", "FAIL", "COMPLETE"]
    told = f"error[storage] {folder}/trial-0001: No space left on device"
    assert out.count(told) == 4 and "tried again (2 of 2)" in out.replace("\n", " ")
    assert f"error[trial] sweep: 1 of 3 trials failed, the first with {told}" in out
    code, out = swept(folder, *QUICK, LR, "sweep.trials=3")  # it has failed for good
    assert code == 5


def test_on_error_stop_ends_the_sweep(tmp_path):
    def patch(patched: pytest.MonkeyPatch) -> None:
        patched.setattr(trial_process, "train", lambda *_: 1 / 0)

    arguments = (*QUICK, LR, "sweep.trials=4", "sweep.on_error=stop", "sweep.retries=0")
    code, out = swept(tmp_path / "sweep", *arguments, patch=patch)
    assert code == 1 and "error[bug] internal: ZeroDivisionError: division by zero" in out
    assert [trial.state.name for trial in trials_of(tmp_path / "sweep")] == ["FAIL"] + ["WAITING"] * 3


def test_changed_search_is_refused(tmp_path):
    """the search space, what every trial shares, and how it is searched; more trials are welcome."""
    folder = tmp_path / "sweep"
    arguments = (*QUICK, "sweep.trials=1", "trainer.max_epochs=1")
    assert swept(folder, *arguments, LR)[0] == 0
    other = LR.replace("0.001", "0.01")
    code, out = swept(folder, *arguments, other, "optimizer.weight_decay=0.5", "sweep.sampler=tpe")
    assert code == 6
    for change in (
        'sweep.space.optimizer.lr: ["log_uniform", 0.001, 1.0, {}, null] -> ["log_uniform", 0.01, 1.0, {}, null]',
        "optimizer.weight_decay: 0.0001 -> 0.5",
        'sweep.sampler: "random" -> "tpe"',
    ):
        assert change in " ".join(out.split())
    code, out = swept(folder, *arguments, LR, "sweep.objectives=[max val/accuracy,min parameters]")
    assert code == 6 and "sweep.objectives:" in out
    code, out = swept(folder, *arguments, LR, "sweep.trials=2", "sweep.parallel=2", "trainer.log_every=7 steps")
    assert code == 0, out
    assert len(trials_of(folder)) == 2
    code, out = swept(folder, *arguments, LR)
    assert code == 2 and "error[config] sweep.trials = 1: may grow only: the sweep has 2 already" in out


def test_folders_of_another_sweep_are_not_reused(tmp_path):
    folder = tmp_path / "sweep"
    assert swept(folder, *QUICK, LR, "sweep.trials=1", "sweep.name=one")[0] == 0
    code, out = swept(folder, *QUICK, LR, "sweep.trials=1", "sweep.name=other", "model.hidden=[8]")
    told = f"error[checkpoint] {folder}/trial-0000: holds another run (model.hidden: [16] -> [8])"
    assert code == 6 and out.count(told) == 2 and "tried again" not in out  # once at once, and once at the end


def test_a_signal_while_a_trial_is_begun_reaches_it(tmp_path):
    """It comes between the claim and the start: the trial would train to its end, and could not be stopped."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        real = Store.claim

        def claim(store: Store) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return real(store)

        patched.setattr(Store, "claim", claim)

    long = (*QUICK, LR, "sweep.trials=1", "trainer.max_epochs=100000")
    code, out = swept(tmp_path / "sweep", *long, patch=patch)
    assert code == 143, out
    assert [trial.state for trial in trials_of(tmp_path / "sweep")] == [TrialState.WAITING]


def test_failure_after_the_time_limit_is_retried_at_the_next_launch(tmp_path):
    def patch(patched: pytest.MonkeyPatch) -> None:
        def train(*_: Any) -> None:
            time.sleep(3)
            raise MemoryError

        patched.setattr(trial_process, "train", train)

    code, out = swept(tmp_path / "sweep", *QUICK, LR, "sweep.trials=2", "sweep.minutes=0.02", patch=patch)
    assert code == 0 and "to be tried again by the next sweep (1 of 2)" in out.replace("\n", " "), out
    assert [trial.state for trial in trials_of(tmp_path / "sweep")] == [TrialState.WAITING] * 2


def test_a_metric_that_was_not_finite_is_left_out(tmp_path):
    """summary.json has null for it: it is no part of a mean, and breaks every constraint."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        real = trial_process.train

        def train(*arguments: Any) -> Any:
            result = real(*arguments)
            if arguments[2] == 1:  # the second seed
                result["metrics"]["val/loss"] = None
            return result

        patched.setattr(trial_process, "train", train)

    given = ("sweep.trials=1", "sweep.seeds=2", "sweep.constraints=['val/loss > 0','val/accuracy >= 0']")
    code, out = swept(tmp_path / "sweep", *QUICK, LR, *given, patch=patch)
    assert code == 0 and "best    none: no trial meets every constraint" in out, out
    (trial,) = trials_of(tmp_path / "sweep")
    assert trial.state == TrialState.COMPLETE and "val/loss" not in trial.user_attrs["metrics"]
    assert trial.constraints["val/loss > 0"] > 0 >= trial.constraints["val/accuracy >= 0"]


def test_sweep_over_an_image_folder(tmp_path):
    """A key that is mandatory, such as the folder of the user's images, is on the card of the best."""
    for number in range(60):
        file = tmp_path / "images" / f"class {number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 4 * number).save(file)
    data = ("data=image_folder", f"data.root='{tmp_path}/images'", "data.image_size=8", "data.channels=1")
    rest = [item for item in QUICK if not item.startswith("data")]
    code, out = swept(tmp_path / "sweep", *data, *rest, LR, "sweep.trials=1", "data.batch_size=8")
    assert code == 0, out
    best = yaml.safe_load((tmp_path / "sweep" / "experiment" / "best.yaml").read_text())
    assert best["data"]["root"] == f"{tmp_path}/images"


# The space


def test_what_is_drawn_is_uniform_on_its_own_scale():
    """A thousand points: each share of a scale is uniform (Kolmogorov and Smirnov), and lists hold together."""
    space = read_space(
        {
            "optimizer": {
                "lr": {"log_uniform": [0.001, 1.0]},
                "momentum": {"one_minus_log": [0.5, 0.999]},
                "betas": {1: {"one_minus_log": [0.9, 0.9999]}},
            },
            "model": {"choice": ["mlp", "lenet5"], "dropout": {"uniform": [0.1, 0.5], "when": {"model": "mlp"}}},
            "augment": {"choice": ["none", ["crop_flip", "mixup"]]},
            "data": {"batch_size": {"log_int": [16, 256]}},
        }
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [draw(space, study.ask()) for _ in range(1000)]

    def shares(key: str, scale: Callable[[float], float], low: float, high: float) -> list[float]:
        return [(scale(p[key]) - scale(low)) / (scale(high) - scale(low)) for p in points if key in p]

    def log_rest(value: float) -> float:
        return -math.log(1 - value)

    for drawn in (
        shares("optimizer.lr", math.log, 0.001, 1.0),
        shares("optimizer.momentum", log_rest, 0.5, 0.999),
        shares("optimizer.betas.1", log_rest, 0.9, 0.9999),
        shares("model.dropout", lambda value: value, 0.1, 0.5),
    ):
        assert stats.kstest(drawn, "uniform").pvalue > 0.01
    assert all(("model.dropout" in p) == (p["model"] == "mlp") for p in points)
    batch_sizes = [p["data.batch_size"] for p in points]
    assert all(type(size) is int and 16 <= size <= 256 for size in batch_sizes)
    assert statistics.median(batch_sizes) == pytest.approx(64, rel=0.15)  # the middle of its logarithm
    arguments = overrides(points[0], {"optimizer.betas": [0.9, 0.999]})
    parsed = {each.key_or_group: each.value() for each in OverridesParser.create().parse_overrides(arguments)}
    assert parsed["optimizer.lr"] == points[0]["optimizer.lr"] and parsed["augment"] == points[0]["augment"]
    assert parsed["optimizer.betas"] == [0.9, points[0]["optimizer.betas.1"]]


def test_a_grid_has_every_combination_once():
    space = read_space(
        {
            "optimizer": {"lr": {"log_uniform": [0.01, 1.0], "points": 3}, "momentum": {"choice": [0.0, 0.9]}},
            "model": {"choice": ["mlp", "lenet5"], "dropout": {"choice": [0.0, 0.5], "when": {"model": "mlp"}}},
        }
    )
    found = grid(space)
    assert len(found) == len({repr(each) for each in found}) == 3 * 2 * (2 + 1)  # no dropout in LeNet-5
    assert sorted({round(each["optimizer.lr"], 9) for each in found}) == [0.01, 0.1, 1.0]


WRONG_SPACES = {
    "{optimizer:{lr:{log_uniform:[0,1]}}}": "sweep.space.optimizer.lr.log_uniform = [0, 1]: must be > 0",
    "{optimizer:{momentum:{one_minus_log:[0.5,1.0]}}}": "sweep.space.optimizer.momentum.one_minus_log = [0.5, 1.0]",
    "{optimizer:{lr:{normal:[0,1]}}}": "sweep.space.optimizer.lr.normal = [0, 1]: must be a dimension",
    "{optimizer:{lr:{uniform:[1,0]}}}": "sweep.space.optimizer.lr.uniform = [1, 0]: must be [low, high]",
    "{augment:{choice:[]}}": "sweep.space.augment.choice = []: must be a list of different values",
    "{data:{batch_size:{choice:[8],when:{model:x}}}}": "sweep.space.data.batch_size.when = model: names no dimension",
    "{model:{choice:[mlp,lenet9]}}": "error[config] model = lenet9: no such option; did you mean lenet? One of",
    "{optimizer:{lrr:{uniform:[0,1]}}}": "error[config] optimizer.lrr = 0: unknown key; did you mean optimizer.lr?",
    "{optimizer:{lr:{uniform:[-1,1]}}}": "error[config] optimizer.lr = -1: must be a number > 0",
}


@pytest.mark.parametrize("space", WRONG_SPACES)
def test_invalid_search_space_is_refused_before_the_first_trial(tmp_path, space):
    code, out = swept(tmp_path / "sweep", *QUICK, "~sweep.space", f"+sweep.space={space}")
    assert code == 2 and out.count("\n") == 1 and WRONG_SPACES[space] in out
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "sweep").glob("[!_]*.yaml")))
def test_every_sweep_that_comes_with_the_code_can_be_drawn_from(name):
    """Every option and bound of its space composes, as at the start of a sweep, and so do points by its sampler."""
    plan = read_plan(compose_config("sweep", [f"sweep={name}"], SweepConfig))
    study = optuna.create_study(directions=[direction for direction, _ in plan.objectives])
    for number in range(min(3, plan.trials)):
        study.sampler = plan.sampler(number)
        if plan.points:
            study.enqueue_trial(plan.points[number])
        trial = study.ask()
        values = draw(plan.space, trial)
        compose_trial(plan.arguments(values), plan.config_dirs)
        study.tell(trial, [0.5 + number / 100] * len(plan.objectives))


# The store


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of our own, on a socket in a folder: its URL."""
    found = [path for path in sorted(Path("/usr/lib/postgresql").glob("*/bin")) if (path / "initdb").exists()]
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    pytest.importorskip("psycopg", reason="the driver is not installed (preceptor[postgresql])")
    user = pwd.getpwnam("nobody").pw_name if os.getuid() == 0 else None  # initdb refuses root
    folder = Path(tempfile.mkdtemp(prefix="preceptor-postgres-"))
    if user:
        shutil.chown(folder, user)

    def call(program: str, *arguments: str) -> None:
        subprocess.run([found[-1] / program, *arguments], check=True, stdout=subprocess.DEVNULL, user=user, cwd="/")

    options = f"-k {folder} -h '' -c fsync=off"
    try:
        call("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "tester", "-N")
        call("pg_ctl", "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "-w", "start")
        yield f"postgresql+psycopg://tester@/postgres?host={folder}"
        call("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str | None:
    """Where the store is: in its folder, or on a server."""
    return request.getfixturevalue("postgres") if request.param == "postgresql" else None


def open_store(folder: Path, url: str | None = None) -> Store:
    folder.mkdir(exist_ok=True)
    return Store(url, folder=folder, name=str(folder), objectives=[("maximize", "val/accuracy")])


def work_off(store: Store, *, seconds: float) -> int:
    """Claim trials until none waits; each takes its time, and its value is its number."""
    done = 0
    while claimed := store.claim():
        trial = optuna.Trial(store.study, claimed[0])
        trial.suggest_float("x", 0, 1)
        if not store.storage.get_trial(claimed[0]).intermediate_values:
            trial.report(0.5, 1)
        time.sleep(seconds)
        done += store.finish(trial, TrialState.COMPLETE, [float(claimed[1])], owner=store.owner)
    return done


def test_eight_workers_share_one_store(tmp_path, url, full, promise):
    """all open, define and fill the same study at once; each trial is done once."""
    count = 200 if full else 40
    children = []
    for _ in range(8):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            with contextlib.suppress(BaseException):
                store = open_store(tmp_path / "sweep", url)
                store.settle_definition({"same": 1})
                store.fill(count)
                with (tmp_path / "done").open("a") as file:
                    file.write(f"{work_off(store, seconds=0.01)}\n")
                code = 0
            os._exit(code)
    assert [ended(child) for child in children] == [0] * 8
    done = [int(line) for line in (tmp_path / "done").read_text().split()]
    assert sum(done) == count
    with contextlib.closing(open_store(tmp_path / "sweep", url)) as store:
        trials = store.trials()
        assert [(each.number, each.value) for each in trials] == [(number, number) for number in range(count)]
        owners = Counter(trial.user_attrs["owner"] for trial in trials)
        assert sorted(owners.values()) == sorted(each for each in done if each)
    promise(21, f"Eight sweeps on one {'server' if url else 'SQLite file'}: each trial once", f"{count} of {count}")


def test_killed_at_every_statement(tmp_path, full, promise):
    """A process that ends at statement k, for every k; the next one finds all trials."""
    count, last = 3, 0
    for k in range(0, 1000, 1 if full else 23):
        folder = tmp_path / str(k)
        child = os.fork()
        if child == 0:
            left = [k]

            def count_down(*_: Any, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

            event.listen(Engine, "before_cursor_execute", count_down)
            event.listen(Engine, "commit", count_down)
            code = 1
            with contextlib.suppress(BaseException):
                store = open_store(folder)
                store.settle_definition({"same": 1})
                store.fill(count)
                work_off(store, seconds=0)
                code = 0
            os._exit(code)
        code = ended(child)
        with contextlib.closing(open_store(folder)) as store:
            store.settle_definition({"same": 1})
            store.fill(count)
            store.requeue(stale_after=3600)
            work_off(store, seconds=0)
            assert [(each.number, each.value) for each in store.trials()] == [(n, n) for n in range(count)], k
            assert all(trial.state == TrialState.COMPLETE for trial in store.trials()), k
        if code == 0:
            break
        assert code == 9
        last = k
    assert code == 0 and last > 60
    promise(22, "A sweep killed at every statement to its store", f"{last // (1 if full else 23) + 1} statements")


def test_requeue_takes_trials_of_dead_and_silent_owners(tmp_path, url):
    with contextlib.closing(open_store(tmp_path / "a", url)) as one:
        one.settle_definition({})
        one.fill(2)
        claimed = one.claim()
        assert claimed is not None
        other = open_store(tmp_path / "a", url)
        assert other.requeue(stale_after=3600) == []  # its owner lives
        assert one.is_mine(claimed[0])
        with one.transaction() as session:
            session.execute(text("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00.000000'"))
        assert other.requeue(stale_after=3600) == [0]  # but has been silent for years
        assert other.claim() == claimed
        assert other.is_mine(claimed[0]) and not one.is_mine(claimed[0])
        assert one.beat([claimed[0]]) == {claimed[0]}  # and hears that the trial is not its own any more
        trial = optuna.Trial(one.study, claimed[0])
        assert not one.finish(trial, TrialState.COMPLETE, [1.0])
        one.release(claimed[0])
        assert other.finish(optuna.Trial(other.study, claimed[0]), TrialState.COMPLETE, [2.0])
        assert [trial.value for trial in other.trials()] == [2.0, None]
        assert other.claim() is not None
        other.close()  # it ends, by an error perhaps, and its trial has no owner
        assert one.requeue(stale_after=3600) == [1]
    assert not list((tmp_path / "a" / ".owners").iterdir())


# What is sought


def test_pruned_trials_can_be_resumed(tmp_path):
    """ASHA with learning rates of which most are far too small; train.py continues one that was pruned."""
    folder = tmp_path / "sweep"
    space = "sweep.space={optimizer:{lr:{log_uniform:[1e-6,1.0]}}}"
    arguments = (*QUICK, "~sweep.space", f"+{space}", "sweep.trials=9", "trainer.max_epochs=9")
    code, out = swept(folder, *arguments, "sweep.pruner=asha", "sweep.grace=1")
    assert code == 0, out
    trials = trials_of(folder)
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert 3 <= len(pruned) < 9 and all(trial.state.is_finished() for trial in trials)
    for trial in pruned:
        summary = json.loads((folder / f"trial-{trial.number:04}" / "summary.json").read_text())
        assert (summary["status"], summary["stop_reason"], summary["test"]) == ("stopped_early", "pruned", {})
        assert trial.last_step == summary["step"] / 6 and trial.last_step in (1, 3)
        told = [line["val/accuracy"] for line in read_lines(folder / f"trial-{trial.number:04}" / "metrics.jsonl")]
        assert list(trial.intermediate_values.values()) == told
    went_on = reopened(folder / f"trial-{pruned[0].number:04}")
    assert went_on is not None
    run_to_end(went_on)
    summary = went_on.folder.read_summary()
    assert summary["status"] == "finished" and summary["step"] == 54 and summary["test"]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_samplers_learn_from_trials_and_constraints(tmp_path, sampler):
    """From claim to result: accuracy is the learning rate itself, so they go up; TPE stays where it is allowed to."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        def train(job: Any, *_: Any) -> Any:
            lr = next(float(item.partition("=")[2]) for item in job["arguments"] if item.startswith("optimizer.lr="))
            metrics = {"val/accuracy": lr, "parameters": 1000 * lr, "seconds": 1.0}
            return {"metrics": metrics, "test": {}, "pruned": False, "step": 1}

        patched.setattr(trial_process, "train", train)

    space = ("~sweep.space", "+sweep.space={optimizer:{lr:{uniform:[0.01,1.0]},momentum:{uniform:[0,0.9]}}}")
    given = (*QUICK, *space, f"sweep.sampler={sampler}", "sweep.startup=8", "sweep.trials=30")

    def late_rates(name: str, *more: str) -> list[float]:
        code, out = swept(tmp_path / name, *given, *more, patch=patch)
        assert code == 0, out
        return [trial.params["optimizer.lr"] for trial in trials_of(tmp_path / name)][-10:]

    assert statistics.median(late_rates("free")) > 0.7  # drawn at random: 0.5
    if sampler == "tpe":
        assert statistics.median(late_rates("bound", "sweep.constraints=['parameters < 300']")) < 0.4


def test_no_trial_is_pruned_before_its_grace():
    """No pruner ends a trial before so many evaluations, and each may at that one."""
    for pruner in ("median", "asha", "hyperband"):
        given = ["sweep=random", f"sweep.pruner={pruner}", "sweep.grace=3", "sweep.startup=1"]
        plan = read_plan(compose_config("sweep", given, SweepConfig))
        study = optuna.create_study(direction="maximize", pruner=plan.pruner())
        ended_at = []
        for quality in (0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1, 0.1):
            trial = study.ask()
            for evaluation in range(1, 31):
                trial.report(quality, evaluation)
                if trial.should_prune():
                    ended_at.append(evaluation)
                    break
            study.tell(trial, quality, state=TrialState.COMPLETE)
        assert min(ended_at) == 3, pruner


def test_infeasible_trials_are_marked_and_never_the_best(tmp_path):
    """Infeasible trials are marked, and are never the best."""
    folder = tmp_path / "sweep"
    space = "+sweep.space={model:{hidden:{choice:[[4],[64]]}}}"
    arguments = (*QUICK, "~sweep.space", space, "sweep.sampler=grid", "sweep.trials=null")
    constraints = "sweep.constraints=['parameters < 1000','seconds <= 60','latency_ms < 1e3']"
    code, out = swept(folder, *arguments, constraints)
    assert code == 0, out
    small, large = trials_of(folder)
    assert small.user_attrs["metrics"]["parameters"] == 64 * 4 + 4 + 4 * 4 + 4
    assert all(violation <= 0 for violation in small.constraints.values())
    assert large.constraints["parameters < 1000"] == pytest.approx((64 * 64 + 64 + 64 * 4 + 4) / 1000 - 1)
    assert large.constraints["seconds <= 60"] < 0 and 0 < large.user_attrs["metrics"]["latency_ms"] < 1000
    best = yaml.safe_load((folder / "experiment" / "best.yaml").read_text())
    assert best["model"] == {"hidden": [4]}
    page = (folder / "sweep.html").read_text()
    assert "class='infeasible'" in page and "http" not in page.replace("http-equiv", "")


def test_pareto_front(tmp_path):
    folder = tmp_path / "sweep"
    space = "+sweep.space={model:{hidden:{choice:[[],[8],[64]]}}}"
    arguments = (*QUICK, "~sweep.space", space, "sweep.sampler=nsga2", "sweep.trials=4", "sweep.startup=2")
    both = "sweep.objectives=[max train/accuracy,min parameters]"
    code, out = swept(folder, *arguments, both)
    assert code == 0, out
    copied = optuna.create_study(directions=["maximize", "minimize"])
    copied.add_trials(trials_of(folder))
    front = {f"trial-{trial.number:04}" for trial in copied.best_trials}  # Optuna's own
    assert {path.stem for path in (folder / "experiment").iterdir()} == front | {"best"}
    code, out = swept(tmp_path / "pruned", *arguments[:-1], both, "sweep.pruner=median")
    assert code == 2 and "error[config] sweep.pruner = median: cannot prune for 2 objectives" in out
    assert not (tmp_path / "pruned").exists()


def test_the_best_is_an_experiment_that_runs_as_it_is(tmp_path):
    """Three seeds, a group, a list in it and a condition: train.py trains what the trial did, to the same weights."""
    folder = tmp_path / "sweep"
    space = """+sweep.space={model:{choice:[mlp],hidden:{choice:[[8,8]],when:{model:mlp}}},
        optimizer:{choice:[adam],betas:{1:{one_minus_log:[0.9,0.999]}}},augment:{choice:[[crop_flip,mixup]]}}"""
    quick = [item for item in QUICK if not item.startswith("model")]
    arguments = (*quick, "~sweep.space", " ".join(space.split()), "sweep.trials=1", "sweep.seeds=3")
    code, out = swept(folder, *arguments)
    assert code == 0, out
    trial = trials_of(folder)[0]
    runs = [json.loads((folder / f"trial-0000-seed-{seed}" / "summary.json").read_text()) for seed in range(3)]
    values = [run["best"]["metrics"]["val/accuracy"] for run in runs]
    assert trial.value == pytest.approx(statistics.mean(values))
    assert trial.user_attrs["spread"]["val/accuracy"] == pytest.approx(statistics.stdev(values))
    arguments = ("trainer.threads=1", "trainer.log_graph=false", "trainer.log_images=false", "seed=1")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train.py", f"--config-dir={folder}", "experiment=best", *arguments])
        patched.setattr(sys, "argv", [*sys.argv, f"run_dir={tmp_path / 'best'}"])
        runpy.run_path(str(SWEEP_SCRIPT.with_name("train.py")), run_name="__main__")
    ours, theirs = last_state(tmp_path / "best"), last_state(folder / "trial-0000-seed-1")
    assert ours[0] == theirs[0] and ours[2] == theirs[2]


def test_divergence_is_a_result(tmp_path):
    """A learning rate that leads to NaN is a bad point, told as such; it is neither tried again nor a failure."""
    folder = tmp_path / "sweep"
    space = "+sweep.space={optimizer:{lr:{choice:[1e30]}}}"
    code, out = swept(folder, *QUICK, "~sweep.space", space, "sweep.trials=2", "loss=squared_error")
    assert code == 0, out
    assert [trial.user_attrs["outcome"] for trial in trials_of(folder)] == ["diverged"] * 2
    assert "best    none" not in out and "tried again" not in out


@pytest.mark.slow  # it imports torch again
def test_cold_workers(tmp_path):
    """sweep.warm=false: a process that imports torch for each trial, through the real command line."""
    arguments = [*QUICK, LR, "sweep.trials=1", "sweep.warm=false", f"sweep.dir={tmp_path / 'sweep'}"]
    done = subprocess.run([sys.executable, SWEEP_SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert trials_of(tmp_path / "sweep")[0].state == TrialState.COMPLETE
    assert done.stdout.count("complete") == 1 and done.stderr == ""


def test_two_sweeps_share_a_server(tmp_path, postgres, full, promise):
    """Two machines, by two folders that know nothing of each other, on one PostgreSQL; both are killed at random."""
    count, kills = (40, 10) if full else (6, 2)
    arguments = (*QUICK, LR, f"sweep.trials={count}", "sweep.parallel=1", "sweep.name=shared", "sweep.retries=10")
    arguments += (f"sweep.storage='{postgres}'", "sweep.stale_after=10")
    chance = random.Random(0)
    folders = [tmp_path / "one", tmp_path / "other"]
    children = {folder: started(folder, *arguments) for folder in folders}
    for number in range(kills):
        time.sleep(chance.uniform(1, 3))
        folder = folders[number % 2]
        os.kill(children[folder], signal.SIGKILL)
        ended(children[folder])
        children[folder] = started(folder, *arguments)
    for folder, child in children.items():
        assert ended(child) == 0, folder.with_suffix(".out").read_text()
    trials = trials_of(tmp_path, postgres, "shared")
    assert [(trial.number, trial.state) for trial in trials] == [(n, TrialState.COMPLETE) for n in range(count)]
    done = [folder.with_suffix(".out").read_text().count(" complete ") for folder in folders]
    assert sum(done) == count and min(done) > 0
    for folder in folders:  # each has the whole report
        assert len((folder / "trials.csv").read_text().splitlines()) == count + 1
    promise(23, "Two sweeps on one PostgreSQL, killed at random", f"{done[0]} + {done[1]} results, {kills} kills")
