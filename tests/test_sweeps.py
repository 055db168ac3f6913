"""Sweeps: sampling, the store and its behaviour under kills, and complete searches by the command line.

The sweeps run scripts/sweep.py, forked from this process, as is the process that forks their trials. torch is already
imported, so that a complete search takes a second or two.
"""

import contextlib
import dataclasses
import json
import math
import os
import pwd
import random
import re
import runpy
import shlex
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
import torch._inductor  # noqa: F401  otherwise each trial imports it again
import yaml
from conftest import SYNTHETIC, fork_script, last_state, reopened, run_to_end, wait_for_exit
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.trial import TrialState
from PIL import Image
from scipy import stats
from sqlalchemy import Engine, event, text

from core.composition import compose_config
from core.config import CONFIGS
from core.errors import InUse
from core.fork_server import ForkServer
from core.json_lines import read_lines
from core.options.commands import SweepConfig
from sweeps.define.compose import compose_trial
from sweeps.define.plan import read_plan
from sweeps.define.space import draw, grid, overrides, read_space
from sweeps.execute import trial as trial_process
from sweeps.execute.store import Store
from sweeps.results.card import command

pytestmark = pytest.mark.thorough

SWEEP_SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "sweep.py"
QUICK = (
    *(*SYNTHETIC, "model=mlp", "model.hidden=[16]", "trainer.max_epochs=3"),
    *("trainer.device=cpu", "trainer.threads=1", "trainer.early_stopping.patience=null", "sweep.pruner=none"),
)


# The command line, forked


def start_sweep(folder: Path, *arguments: str, patch: Callable[[pytest.MonkeyPatch], None] = lambda _: None) -> int:
    """Start scripts/sweep.py in a new process and return its pid. Its output goes to FOLDER.out."""

    def as_daemon(server: ForkServer, control: socket.socket, parent: int, serve: Any = ForkServer._serve) -> None:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(server.errors, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), 2)
        serve(server, control, parent)

    def with_forks(patched: pytest.MonkeyPatch) -> None:  # torch is already imported
        patched.setattr(ForkServer, "_execute", ForkServer._fork)
        patched.setattr(ForkServer, "_serve", as_daemon)
        patch(patched)

    return fork_script(
        SWEEP_SCRIPT, f"sweep.dir={folder}", *arguments, output=folder.with_suffix(".out"), patch=with_forks
    )


def run_sweep(folder: Path, *arguments: str, within: float = 100, **options: Any) -> tuple[int, str]:
    """Run a sweep to its end; return its exit code and its output."""
    code = wait_for_exit(start_sweep(folder, *arguments, **options), within=within)
    return code, folder.with_suffix(".out").read_text()


def trials_of(folder: Path, url: str | None = None, name: str | None = None) -> list[optuna.trial.FrozenTrial]:
    """Return the trials in the store, read by Optuna."""
    storage = optuna.storages.RDBStorage(url or f"sqlite:///{folder}/sweep.db")
    try:
        return optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    finally:
        storage.engine.dispose()


def descendants(process: int) -> list[int]:
    """Return the descendants of a process."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    pids = list(children.get(process, []))
    for pid in pids:
        pids += children.get(pid, [])
    return pids


LR = "sweep.space={optimizer:{lr:{log_uniform:[0.001,1.0]}}}"


def test_random_search_stores_the_results_of_all_trials(tmp_path):
    folder = tmp_path / "sweep"
    code, out = run_sweep(folder, *QUICK, "sweep.trials=5", "sweep.parallel=2")
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
    assert code == 0 and run_sweep(folder, *QUICK, "sweep.trials=5", "sweep.parallel=2")[0] == 0  # all trials are done
    assert [trial.datetime_complete for trial in trials_of(folder)] == [trial.datetime_complete for trial in trials]


def test_sigterm_saves_the_sweep_and_the_same_command_continues_it(tmp_path):
    """SIGTERM during trials: exit 143, no process remains, no result is lost; the end is bit-identical.

    A running trial cannot be resumed by hand. The sweep uses the result of a stopped trial that was resumed by hand.
    """
    folder = tmp_path / "sweep"
    long = (*QUICK, LR, "sweep.trials=2", "sweep.parallel=2", "trainer.max_epochs=120")
    child = start_sweep(folder, *long)
    for number in range(2):  # wait for both: a starting trial has child processes that run git
        wait_for(lambda run=folder / f"trial-{number:04}": (run / "metrics.jsonl").exists() and lines(run) > 3)
    processes = descendants(child)
    assert len(processes) == 3  # the server and two trials
    with pytest.raises(InUse, match="in use by process"):
        reopened(folder / "trial-0000")
    os.kill(child, signal.SIGTERM)
    assert wait_for_exit(child) == 143
    assert not [process for process in processes if Path(f"/proc/{process}").exists()]
    assert [trial.state for trial in trials_of(folder)] == [TrialState.WAITING] * 2
    stopped = json.loads((folder / "trial-0001" / "summary.json").read_text())
    assert stopped["status"] == "interrupted" and 0 < stopped["step"] < 720
    by_hand = reopened(folder / "trial-0000")
    assert by_hand is not None
    run_to_end(by_hand)
    code, out = run_sweep(folder, *long)
    assert code == 0, out
    assert [trial.state for trial in trials_of(folder)] == [TrialState.COMPLETE] * 2
    assert run_sweep(tmp_path / "uninterrupted", *long)[0] == 0
    for name in ("trial-0000", "trial-0001"):
        actual, expected = (last_state(sweep / name) for sweep in (folder, tmp_path / "uninterrupted"))
        assert actual[0] == expected[0] and actual[2] == expected[2]


def wait_for(condition: Callable[[], bool], *, within: float = 60) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines())


def test_sweep_that_is_killed_again_and_again_completes_bit_identically(tmp_path, full, promise):
    """Sweep, server and trials are killed; each of N trials has one result, bit-identical to an uninterrupted one."""
    count, kills = (40, 10) if full else (6, 3)
    folder, uninterrupted = tmp_path / "sweep", tmp_path / "uninterrupted"
    arguments = (*QUICK, LR, f"sweep.trials={count}", "sweep.parallel=2", "trainer.max_epochs=12", "sweep.retries=10")
    generator, kill_counts = random.Random(0), Counter[str]()
    all_kills_done = tmp_path / "enough"

    def patch(patched: pytest.MonkeyPatch) -> None:
        real = trial_process.train

        def train(job: Any, run: Path, *arguments: Any) -> Any:
            if run.name == f"trial-{count - 1:04}":  # keeps one trial running until the last kill, on any machine
                wait_for(all_kills_done.exists, within=400)
            return real(job, run, *arguments)

        patched.setattr(trial_process, "train", train)

    while kill_counts.total() < kills:
        child = start_sweep(folder, *arguments, patch=patch)
        while kill_counts.total() < kills:
            wait_for(lambda child=child: len(descendants(child)) > 1)  # the server and a trial
            time.sleep(generator.uniform(0.1, 0.8))
            processes = descendants(child)
            if len(processes) < 2:  # it was just killed
                continue
            victim = generator.choice(["sweep", "server", "trial"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(
                    {"sweep": child, "server": processes[0], "trial": generator.choice(processes[1:])}[victim],
                    signal.SIGKILL,
                )
            kill_counts[victim] += 1
            if kill_counts.total() == kills:
                all_kills_done.touch()
            if victim == "sweep":
                assert wait_for_exit(child) == -signal.SIGKILL
                wait_for(lambda processes=processes: not any(is_alive(process) for process in processes), within=2)
                break
        else:
            assert wait_for_exit(child, within=400) == 0, folder.with_suffix(".out").read_text()
    code, out = run_sweep(folder, *arguments, within=400)
    assert code == 0, out
    assert run_sweep(uninterrupted, *arguments, within=400)[0] == 0
    actual, expected = trials_of(folder), trials_of(uninterrupted)
    assert len(actual) == count and sorted(path.name for path in folder.glob("trial-*")) == [
        f"trial-{number:04}" for number in range(count)
    ]
    assert [(trial.number, trial.state, trial.params, trial.value) for trial in actual] == [
        (trial.number, TrialState.COMPLETE, trial.params, trial.value) for trial in expected
    ]
    for number in range(count):
        name = f"trial-{number:04}"
        assert last_state(folder / name)[::2] == last_state(uninterrupted / name)[::2]
    summary = ", ".join(f"{number} {victim}" for victim, number in sorted(kill_counts.items()))
    promise(
        20, "A sweep survives SIGKILL of itself and its trials", f"{count} of {count} results after {summary} killed"
    )


def is_alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_trial_that_always_fails_is_retried_twice_and_the_others_complete(tmp_path):
    """Each failure is logged at once in one line; the sweep exits with the code of the failure."""
    folder = tmp_path / "sweep"

    def patch(patched: pytest.MonkeyPatch) -> None:
        real = trial_process.train

        def train(job: Any, run: Path, *arguments: Any) -> Any:
            if run.name == "trial-0001":
                with (folder / "tries").open("a") as file:
                    file.write("x")
                raise OSError(28, "No space left on device", str(run))
            return real(job, run, *arguments)

        patched.setattr(trial_process, "train", train)

    code, out = run_sweep(folder, *QUICK, LR, "sweep.trials=3", patch=patch)
    assert code == 5
    assert (folder / "tries").read_text() == "xxx"
    assert [trial.state.name for trial in trials_of(folder)] == ["COMPLETE", "FAIL", "COMPLETE"]
    message = f"error[storage] {folder}/trial-0001: No space left on device"
    assert out.count(message) == 4 and "queued again (retry 2 of 2)" in out.replace("\n", " ")
    assert f"error[trial] sweep: 1 of 3 trials failed, the first with {message}" in out
    code, out = run_sweep(folder, *QUICK, LR, "sweep.trials=3")  # it is not retried again
    assert code == 5


def test_on_error_stop_ends_the_sweep(tmp_path):
    def patch(patched: pytest.MonkeyPatch) -> None:
        patched.setattr(trial_process, "train", lambda *_: 1 / 0)

    arguments = (*QUICK, LR, "sweep.trials=4", "sweep.on_error=stop", "sweep.retries=0")
    code, out = run_sweep(tmp_path / "sweep", *arguments, patch=patch)
    assert code == 1 and "error[bug] internal: ZeroDivisionError: division by zero" in out
    assert [trial.state.name for trial in trials_of(tmp_path / "sweep")] == ["FAIL"] + ["WAITING"] * 3


def test_changed_search_is_refused_and_more_trials_are_allowed(tmp_path):
    """Refused: another search space, config or sampler. Allowed: more trials."""
    folder = tmp_path / "sweep"
    arguments = (*QUICK, "sweep.trials=1", "trainer.max_epochs=1")
    assert run_sweep(folder, *arguments, LR)[0] == 0
    other = LR.replace("0.001", "0.01")
    code, out = run_sweep(folder, *arguments, other, "optimizer.weight_decay=0.5", "sweep.sampler=tpe")
    assert code == 6
    for change in (
        'sweep.space.optimizer.lr: ["log_uniform", 0.001, 1.0, {}, null] -> ["log_uniform", 0.01, 1.0, {}, null]',
        "optimizer.weight_decay: 0.0001 -> 0.5",
        'sweep.sampler: "random" -> "tpe"',
    ):
        assert change in " ".join(out.split())
    code, out = run_sweep(folder, *arguments, LR, "sweep.objectives=[max val/accuracy,min parameters]")
    assert code == 6 and "sweep.objectives:" in out
    code, out = run_sweep(folder, *arguments, LR, "sweep.trials=2", "sweep.parallel=2", "trainer.log_every=7 steps")
    assert code == 0, out
    assert len(trials_of(folder)) == 2
    code, out = run_sweep(folder, *arguments, LR)
    assert code == 2 and "error[config] sweep.trials = 1: must be at least 2" in " ".join(out.split())


def test_folders_of_another_sweep_are_not_reused(tmp_path):
    folder = tmp_path / "sweep"
    assert run_sweep(folder, *QUICK, LR, "sweep.trials=1", "sweep.name=one")[0] == 0
    code, out = run_sweep(folder, *QUICK, LR, "sweep.trials=1", "sweep.name=other", "model.hidden=[8]")
    message = f"error[checkpoint] {folder}/trial-0000: contains another run (model.hidden: [16] -> [8])"
    assert code == 6 and out.count(message) == 2 and "(retry " not in out  # once immediately and once at the end


def test_renamed_folder_continues_its_study(tmp_path):
    folder, renamed = tmp_path / "sweep", tmp_path / "renamed"
    assert run_sweep(folder, *QUICK, LR, "sweep.trials=1")[0] == 0
    folder.rename(renamed)
    other_space = "sweep.space={optimizer:{lr:{log_uniform:[0.01,1.0]}}}"
    code, out = run_sweep(renamed, *QUICK, other_space, "sweep.trials=2")
    assert code == 6 and "was started with another definition" in " ".join(out.split())
    assert run_sweep(renamed, *QUICK, LR, "sweep.trials=2")[0] == 0
    storage = optuna.storages.RDBStorage(f"sqlite:///{renamed}/sweep.db")
    assert [study.study_name for study in storage.get_all_studies()] == ["sweep"]
    storage.engine.dispose()
    assert [trial.number for trial in trials_of(renamed)] == [0, 1]


def test_signal_between_claim_and_start_stops_the_trial(tmp_path):
    """Without handling of this case, the trial could not be stopped before its end."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        real = Store.claim

        def claim(store: Store) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return real(store)

        patched.setattr(Store, "claim", claim)

    long = (*QUICK, LR, "sweep.trials=1", "trainer.max_epochs=100000")
    code, out = run_sweep(tmp_path / "sweep", *long, patch=patch)
    assert code == 143, out
    assert [trial.state for trial in trials_of(tmp_path / "sweep")] == [TrialState.WAITING]


def test_failure_after_the_time_limit_is_retried_at_the_next_launch(tmp_path):
    def patch(patched: pytest.MonkeyPatch) -> None:
        def train(*_: Any) -> None:
            time.sleep(3)
            raise MemoryError

        patched.setattr(trial_process, "train", train)

    code, out = run_sweep(tmp_path / "sweep", *QUICK, LR, "sweep.trials=2", "sweep.minutes=0.02", patch=patch)
    assert code == 0 and "deferred to the next launch (retry 1 of 2)" in out.replace("\n", " "), out
    assert [trial.state for trial in trials_of(tmp_path / "sweep")] == [TrialState.WAITING] * 2


def test_nonfinite_metric_of_a_trial_is_left_out_and_violates_constraints(tmp_path):
    """summary.json has null for the metric: it is excluded from means and violates every constraint on it."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        real = trial_process.train

        def train(*arguments: Any) -> Any:
            result = real(*arguments)
            if arguments[2] == 1:  # the second seed
                result["metrics"]["val/loss"] = None
            return result

        patched.setattr(trial_process, "train", train)

    sweep_overrides = ("sweep.trials=1", "sweep.seeds=2", "sweep.constraints=['val/loss > 0','val/accuracy >= 0']")
    code, out = run_sweep(tmp_path / "sweep", *QUICK, LR, *sweep_overrides, patch=patch)
    assert code == 0 and "best    none: no trial meets every constraint" in out, out
    (trial,) = trials_of(tmp_path / "sweep")
    assert trial.state == TrialState.COMPLETE and "val/loss" not in trial.user_attrs["metrics"]
    assert trial.constraints["val/loss > 0"] > 0 >= trial.constraints["val/accuracy >= 0"]


def test_best_experiment_of_a_sweep_over_an_image_folder_contains_data_root(tmp_path):
    """Mandatory keys, such as the folder of the user's images, are in experiment/best.yaml."""
    for number in range(60):
        file = tmp_path / "images" / f"class {number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 4 * number).save(file)
    data = ("data=image_folder", f"data.root='{tmp_path}/images'", "data.image_size=8", "data.channels=1")
    other_overrides = [item for item in QUICK if not item.startswith("data")]
    code, out = run_sweep(tmp_path / "sweep", *data, *other_overrides, LR, "sweep.trials=1", "data.batch_size=8")
    assert code == 0, out
    best = yaml.safe_load((tmp_path / "sweep" / "experiment" / "best.yaml").read_text())
    assert best["data"]["root"] == f"{tmp_path}/images"


# The search space


def test_sampled_values_are_uniform_on_the_scale_of_their_dimension():
    """A Kolmogorov-Smirnov test of 1,000 points per dimension; lists are composed of their sampled items."""
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

    def one_minus_log(value: float) -> float:
        return -math.log(1 - value)

    for positions in (
        shares("optimizer.lr", math.log, 0.001, 1.0),
        shares("optimizer.momentum", one_minus_log, 0.5, 0.999),
        shares("optimizer.betas.1", one_minus_log, 0.9, 0.9999),
        shares("model.dropout", lambda value: value, 0.1, 0.5),
    ):
        assert stats.kstest(positions, "uniform").pvalue > 0.01
    assert all(("model.dropout" in p) == (p["model"] == "mlp") for p in points)
    batch_sizes = [p["data.batch_size"] for p in points]
    assert all(type(size) is int and 16 <= size <= 256 for size in batch_sizes)
    assert statistics.median(batch_sizes) == pytest.approx(64, rel=0.15)  # the middle on the logarithmic scale
    arguments = overrides(points[0], {"optimizer.betas": [0.9, 0.999]})
    parsed = {item.key_or_group: item.value() for item in OverridesParser.create().parse_overrides(arguments)}
    assert parsed["optimizer.lr"] == points[0]["optimizer.lr"] and parsed["augment"] == points[0]["augment"]
    assert parsed["optimizer.betas"] == [0.9, points[0]["optimizer.betas.1"]]


def test_grid_contains_every_combination_once():
    space = read_space(
        {
            "optimizer": {"lr": {"log_uniform": [0.01, 1.0], "points": 3}, "momentum": {"choice": [0.0, 0.9]}},
            "model": {"choice": ["mlp", "lenet5"], "dropout": {"choice": [0.0, 0.5], "when": {"model": "mlp"}}},
        }
    )
    points = grid(space)
    assert len(points) == len({repr(point) for point in points}) == 3 * 2 * (2 + 1)  # no dropout in LeNet-5
    assert sorted({round(point["optimizer.lr"], 9) for point in points}) == [0.01, 0.1, 1.0]


INVALID_SPACES = {
    "{optimizer:{lr:{log_uniform:[0,1]}}}": "sweep.space.optimizer.lr.log_uniform = [0, 1]: must be > 0",
    "{optimizer:{momentum:{one_minus_log:[0.5,1.0]}}}": "sweep.space.optimizer.momentum.one_minus_log = [0.5, 1.0]",
    "{optimizer:{lr:{normal:[0,1]}}}": "sweep.space.optimizer.lr.normal = [0, 1]: must be a dimension",
    "{optimizer:{lr:{uniform:[1,0]}}}": "sweep.space.optimizer.lr.uniform = [1, 0]: must be [low, high]",
    "{augment:{choice:[]}}": "sweep.space.augment.choice = []: must be a list of different values",
    "{data:{batch_size:{choice:[8],when:{model:x}}}}": "sweep.space.data.batch_size.when = model: is not a dimension",
    "{model:{choice:[mlp,lenet9]}}": "error[config] model = lenet9: no such option; did you mean lenet? One of",
    "{optimizer:{lrr:{uniform:[0,1]}}}": "error[config] optimizer.lrr = 0: unknown key; did you mean optimizer.lr?",
    "{optimizer:{lr:{uniform:[-1,1]}}}": "error[config] optimizer.lr = -1: must be a number > 0",
}


@pytest.mark.parametrize("space", INVALID_SPACES)
def test_invalid_search_space_is_refused_before_the_first_trial(tmp_path, space):
    code, out = run_sweep(tmp_path / "sweep", *QUICK, "~sweep.space", f"+sweep.space={space}")
    assert code == 2 and out.count("\n") == 1 and INVALID_SPACES[space] in out
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "sweep").glob("[!_]*.yaml")))
def test_each_sweep_config_composes_and_can_be_sampled(name):
    """All options and bounds of the space compose, as at the start of a sweep, and so do sampled points."""
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
    """Start a PostgreSQL server on a socket in a temporary folder and yield its URL."""
    installations = [path for path in sorted(Path("/usr/lib/postgresql").glob("*/bin")) if (path / "initdb").exists()]
    if not installations:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    pytest.importorskip("psycopg", reason="the driver is not installed (preceptor[postgresql])")
    user = pwd.getpwnam("nobody").pw_name if os.getuid() == 0 else None  # initdb refuses root
    folder = Path(tempfile.mkdtemp(prefix="preceptor-postgres-"))
    if user:
        shutil.chown(folder, user)

    def call(program: str, *arguments: str) -> None:
        subprocess.run(
            [installations[-1] / program, *arguments], check=True, stdout=subprocess.DEVNULL, user=user, cwd="/"
        )

    options = f"-k {folder} -h '' -c fsync=off"
    try:
        call("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "tester", "-N")
        call("pg_ctl", "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "-w", "start")
        yield f"postgresql+psycopg://tester@/postgres?host={folder}"
        call("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def pg_ctl(url: str, *arguments: str) -> None:
    """Run pg_ctl for the server of the `postgres` fixture."""
    folder = url.partition("?host=")[2]
    program = max(path for path in Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    user = "nobody" if os.getuid() == 0 else None
    command = [program, "-D", f"{folder}/data", "-l", f"{folder}/log", "-w", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=user, cwd="/")


def test_sweep_continues_when_its_database_server_restarts(tmp_path, postgres):
    folder, count = tmp_path / "sweep", 6
    storage = (f"sweep.storage='{postgres}'", "sweep.name=restarts", "sweep.stale_after=30")
    sweep = start_sweep(folder, *QUICK, LR, *storage, f"sweep.trials={count}", "sweep.parallel=2")
    while not list(folder.glob("trial-*/metrics.jsonl")):
        time.sleep(0.02)
    pg_ctl(postgres, "restart", "-m", "fast")
    pg_ctl(postgres, "stop", "-m", "immediate")  # as a crash
    time.sleep(2)
    pg_ctl(postgres, "-o", f"-k {postgres.partition('?host=')[2]} -h '' -c fsync=off", "start")
    code = wait_for_exit(sweep, within=100)
    assert code == 0, folder.with_suffix(".out").read_text()
    trials = trials_of(folder, postgres, "restarts")
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * count


def test_server_that_stays_away_is_a_storage_error(tmp_path, postgres):
    folder = tmp_path / "sweep"
    storage = (f"sweep.storage='{postgres}'", "sweep.name=away", "sweep.stale_after=10")
    sweep = start_sweep(folder, *QUICK, LR, *storage, "sweep.trials=20")
    while not list(folder.glob("trial-*/metrics.jsonl")):
        time.sleep(0.02)
    pg_ctl(postgres, "stop", "-m", "fast")
    try:
        assert wait_for_exit(sweep, within=60) == 5
        last = folder.with_suffix(".out").read_text().splitlines()[-1]
        assert last.startswith("error[storage] postgresql+psycopg://") and "cannot be used" in last
    finally:
        pg_ctl(postgres, "-o", f"-k {postgres.partition('?host=')[2]} -h '' -c fsync=off", "start")


def test_database_that_is_damaged_in_its_middle_is_a_storage_error(tmp_path):
    folder = tmp_path / "sweep"
    assert run_sweep(folder, *QUICK, LR, "sweep.trials=2")[0] == 0
    content = bytearray((folder / "sweep.db").read_bytes())
    content[4096:] = b"\xaa" * (len(content) - 4096)
    (folder / "sweep.db").write_bytes(content)
    for leftover in folder.glob("sweep.db-*"):
        leftover.unlink()
    code, out = run_sweep(folder, *QUICK, LR, "sweep.trials=3")
    assert code == 5 and out.splitlines()[-1].startswith("error[storage]") and "Traceback" not in out, out


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str | None:
    """Return the URL of the store: None for SQLite in its folder, or that of a server."""
    return request.getfixturevalue("postgres") if request.param == "postgresql" else None


def open_store(folder: Path, url: str | None = None) -> Store:
    folder.mkdir(exist_ok=True)
    return Store(url, folder=folder, name=str(folder), objectives=[("maximize", "val/accuracy")])


def finish_all_trials(store: Store, *, seconds: float) -> int:
    """Claim and finish all waiting trials; each takes `seconds`, and its value is its number. Return how many."""
    done = 0
    while claimed := store.claim():
        trial = optuna.Trial(store.study, claimed[0])
        trial.suggest_float("x", 0, 1)
        if not store.storage.get_trial(claimed[0]).intermediate_values:
            trial.report(0.5, 1)
        time.sleep(seconds)
        done += store.finish(trial, TrialState.COMPLETE, [float(claimed[1])], owner=store.owner)
    return done


def test_eight_workers_share_one_store_and_run_each_trial_once(tmp_path, url, full, promise):
    """All workers open, define and fill the same study at the same time."""
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
                    file.write(f"{finish_all_trials(store, seconds=0.01)}\n")
                code = 0
            os._exit(code)
    assert [wait_for_exit(child) for child in children] == [0] * 8
    done = [int(line) for line in (tmp_path / "done").read_text().split()]
    assert sum(done) == count
    with contextlib.closing(open_store(tmp_path / "sweep", url)) as store:
        trials = store.trials()
        assert [(trial.number, trial.value) for trial in trials] == [(number, number) for number in range(count)]
        owners = Counter(trial.user_attrs["owner"] for trial in trials)
        assert sorted(owners.values()) == sorted(number for number in done if number)
    promise(21, f"Eight sweeps on one {'server' if url else 'SQLite file'}: each trial once", f"{count} of {count}")


def test_sweep_killed_at_every_statement_to_its_store_loses_no_trial(tmp_path, full, promise):
    """For every k, a process exits at statement k and the next process finds all trials."""
    count, last = 3, 0
    for k in range(0, 1000, 1 if full else 23):
        folder = tmp_path / str(k)
        child = os.fork()
        if child == 0:
            remaining = [k]

            def count_down(*_: Any, remaining: list[int] = remaining) -> None:
                remaining[0] -= 1
                if remaining[0] < 0:
                    os._exit(9)

            event.listen(Engine, "before_cursor_execute", count_down)
            event.listen(Engine, "commit", count_down)
            code = 1
            with contextlib.suppress(BaseException):
                store = open_store(folder)
                store.settle_definition({"same": 1})
                store.fill(count)
                finish_all_trials(store, seconds=0)
                code = 0
            os._exit(code)
        code = wait_for_exit(child)
        with contextlib.closing(open_store(folder)) as store:
            store.settle_definition({"same": 1})
            store.fill(count)
            store.requeue(stale_after=3600)
            finish_all_trials(store, seconds=0)
            assert [(trial.number, trial.value) for trial in store.trials()] == [(n, n) for n in range(count)], k
            assert all(trial.state == TrialState.COMPLETE for trial in store.trials()), k
        if code == 0:
            break
        assert code == 9
        last = k
    assert code == 0 and last > 60
    promise(22, "A sweep killed at every statement to its store", f"{last // (1 if full else 23) + 1} statements")


def test_requeue_returns_trials_of_dead_and_stale_owners_to_the_queue(tmp_path, url):
    with contextlib.closing(open_store(tmp_path / "a", url)) as first:
        first.settle_definition({})
        first.fill(2)
        claimed = first.claim()
        assert claimed is not None
        second = open_store(tmp_path / "a", url)
        assert second.requeue(stale_after=3600) == []  # its owner is alive
        assert first.is_mine(claimed[0])
        with first.transaction() as session:
            session.execute(text("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00.000000'"))
        assert second.requeue(stale_after=3600) == [0]  # the last heartbeat is years old
        assert second.claim() == claimed
        assert second.is_mine(claimed[0]) and not first.is_mine(claimed[0])
        assert first.beat([claimed[0]]) == {claimed[0]}  # it learns that it has lost the trial
        trial = optuna.Trial(first.study, claimed[0])
        assert not first.finish(trial, TrialState.COMPLETE, [1.0])
        first.release(claimed[0])
        assert second.finish(optuna.Trial(second.study, claimed[0]), TrialState.COMPLETE, [2.0])
        assert [trial.value for trial in second.trials()] == [2.0, None]
        assert second.claim() is not None
        second.close()  # e.g. after an error: its trial has no owner
        assert first.requeue(stale_after=3600) == [1]
    assert not list((tmp_path / "a" / ".owners").iterdir())


# Pruning, constraints and objectives


def test_pruned_trials_can_be_resumed(tmp_path):
    """ASHA with learning rates that are mostly far too small; train.py resumes a pruned trial."""
    folder = tmp_path / "sweep"
    space = "sweep.space={optimizer:{lr:{log_uniform:[1e-6,1.0]}}}"
    arguments = (*QUICK, "~sweep.space", f"+{space}", "sweep.trials=9", "trainer.max_epochs=9")
    code, out = run_sweep(folder, *arguments, "sweep.pruner=asha", "sweep.grace=1")
    assert code == 0, out
    trials = trials_of(folder)
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert 3 <= len(pruned) < 9 and all(trial.state.is_finished() for trial in trials)
    for trial in pruned:
        summary = json.loads((folder / f"trial-{trial.number:04}" / "summary.json").read_text())
        assert (summary["status"], summary["stop_reason"], summary["test"]) == ("stopped_early", "pruned", {})
        assert trial.last_step == summary["step"] / 6 and trial.last_step in (1, 3)
        accuracies = [
            line["val/accuracy"] for line in read_lines(folder / f"trial-{trial.number:04}" / "metrics.jsonl")
        ]
        assert list(trial.intermediate_values.values()) == accuracies
    resumed = reopened(folder / f"trial-{pruned[0].number:04}")
    assert resumed is not None
    run_to_end(resumed)
    summary = resumed.folder.read_summary()
    assert summary["status"] == "finished" and summary["step"] == 54 and summary["test"]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_samplers_learn_from_trials_and_constraints(tmp_path, sampler):
    """The accuracy equals the learning rate, so the samplers increase it; TPE respects the constraint."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        def train(job: Any, *_: Any) -> Any:
            lr = next(float(item.partition("=")[2]) for item in job["arguments"] if item.startswith("optimizer.lr="))
            metrics = {"val/accuracy": lr, "parameters": 1000 * lr, "seconds": 1.0}
            return {"metrics": metrics, "test": {}, "pruned": False, "step": 1}

        patched.setattr(trial_process, "train", train)

    space = ("~sweep.space", "+sweep.space={optimizer:{lr:{uniform:[0.01,1.0]},momentum:{uniform:[0,0.9]}}}")
    base_overrides = (*QUICK, *space, f"sweep.sampler={sampler}", "sweep.startup=8", "sweep.trials=30")

    def late_lrs(name: str, *more_overrides: str) -> list[float]:
        code, out = run_sweep(tmp_path / name, *base_overrides, *more_overrides, patch=patch)
        assert code == 0, out
        return [trial.params["optimizer.lr"] for trial in trials_of(tmp_path / name)][-10:]

    assert statistics.median(late_lrs("free")) > 0.7  # random search: 0.5
    if sampler == "tpe":
        assert statistics.median(late_lrs("bound", "sweep.constraints=['parameters < 300']")) < 0.4


def test_trials_are_not_pruned_before_their_grace():
    """No pruner ends a trial before `sweep.grace` evaluations; each may end it at that one."""
    for pruner in ("median", "asha", "hyperband"):
        plan_overrides = ["sweep=random", f"sweep.pruner={pruner}", "sweep.grace=3", "sweep.startup=1"]
        plan = read_plan(compose_config("sweep", plan_overrides, SweepConfig))
        study = optuna.create_study(direction="maximize", pruner=plan.pruner())
        pruned_at = []
        for quality in (0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1, 0.1):
            trial = study.ask()
            for evaluation in range(1, 31):
                trial.report(quality, evaluation)
                if trial.should_prune():
                    pruned_at.append(evaluation)
                    break
            study.tell(trial, quality, state=TrialState.COMPLETE)
        assert min(pruned_at) == 3, pruner


def test_infeasible_trials_are_marked_and_never_the_best(tmp_path):
    folder = tmp_path / "sweep"
    space = "+sweep.space={model:{hidden:{choice:[[4],[64]]}}}"
    arguments = (*QUICK, "~sweep.space", space, "sweep.sampler=grid", "sweep.trials=null")
    constraints = "sweep.constraints=['parameters < 1000','seconds <= 60','latency_ms < 1e3']"
    code, out = run_sweep(folder, *arguments, constraints)
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
    assert not (folder / "errors.txt").exists()  # no trial wrote to it
    assert "1 complete, 1 infeasible" in page and "trial    1 infeasible" in out and "1 infeasible" in out
    # It names the command, reads well on a phone, and links to the run folders.
    assert "python scripts/sweep.py" in page and "name='viewport'" in page
    assert re.findall(r"<a href='([^']+)'>", page) == ["trial-0000", "trial-0001"]
    assert all((folder / name / "summary.json").exists() for name in ("trial-0000", "trial-0001"))


def test_pareto_front_equals_optunas_and_is_saved_as_experiments(tmp_path):
    folder = tmp_path / "sweep"
    space = "+sweep.space={model:{hidden:{choice:[[],[8],[64]]}}}"
    arguments = (*QUICK, "~sweep.space", space, "sweep.sampler=nsga2", "sweep.trials=4", "sweep.startup=2")
    objectives = "sweep.objectives=[max train/accuracy,min parameters]"
    code, out = run_sweep(folder, *arguments, objectives)
    assert code == 0, out
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.add_trials(trials_of(folder))
    front = {f"trial-{trial.number:04}" for trial in study.best_trials}  # as computed by Optuna
    assert {path.stem for path in (folder / "experiment").iterdir()} == front | {"best"}
    code, out = run_sweep(tmp_path / "pruned", *arguments[:-1], objectives, "sweep.pruner=median")
    assert code == 2 and "error[config] sweep.pruner = median: cannot prune for 2 objectives" in out
    assert not (tmp_path / "pruned").exists()


def test_best_experiment_reproduces_the_best_trial_bit_identically(tmp_path):
    """Three seeds and a space with groups, a list and a condition: train.py gives the same weights as the trial."""
    folder = tmp_path / "sweep"
    space = """+sweep.space={model:{choice:[mlp],hidden:{choice:[[8,8]],when:{model:mlp}}},
        optimizer:{choice:[adam],betas:{1:{one_minus_log:[0.9,0.999]}}},augment:{choice:[[crop_flip,mixup]]}}"""
    quick = [item for item in QUICK if not item.startswith("model")]
    arguments = (*quick, "~sweep.space", " ".join(space.split()), "sweep.trials=1", "sweep.seeds=3")
    code, out = run_sweep(folder, *arguments)
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
    actual, expected = last_state(tmp_path / "best"), last_state(folder / "trial-0000-seed-1")
    assert actual[0] == expected[0] and actual[2] == expected[2]


def test_command_of_a_card_can_be_pasted_into_a_shell(tmp_path):
    """Folders with spaces and the brackets of Hydra's search path are quoted."""
    folder = tmp_path / "my sweeps"
    folder.mkdir()
    config = compose_config("sweep", ["sweep=random", f"sweep.dir='{folder}'"], SweepConfig, folders=[folder])
    plan = read_plan(dataclasses.replace(config, config_dirs=[str(folder)]))
    assert shlex.split(command(plan, "best")) == [
        *("python", "scripts/train.py", f"--config-dir={folder}", "experiment=best"),
        f"hydra.searchpath=[file://{folder}]",
    ]


def test_diverged_trial_is_a_result_and_is_not_retried(tmp_path):
    """A learning rate that leads to NaN is recorded as a bad point; it is neither retried nor a failure."""
    folder = tmp_path / "sweep"
    space = "+sweep.space={optimizer:{lr:{choice:[1e30]}}}"
    code, out = run_sweep(folder, *QUICK, "~sweep.space", space, "sweep.trials=2", "loss=squared_error")
    assert code == 0, out
    assert [trial.user_attrs["outcome"] for trial in trials_of(folder)] == ["diverged"] * 2
    assert "best    none" not in out and "(retry " not in out


@pytest.mark.slow  # imports torch again
def test_sweep_without_warm_server_runs_trials_in_new_processes(tmp_path):
    """sweep.warm=false starts a process that imports torch for each trial, by the real command line."""
    arguments = [*QUICK, LR, "sweep.trials=1", "sweep.warm=false", f"sweep.dir={tmp_path / 'sweep'}"]
    done = subprocess.run([sys.executable, SWEEP_SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert trials_of(tmp_path / "sweep")[0].state == TrialState.COMPLETE
    assert done.stdout.count("complete") == 1 and done.stderr == ""


def test_two_killed_sweeps_share_a_server_and_run_each_trial_once(tmp_path, postgres, full, promise):
    """Simulates two machines: two independent folders on one PostgreSQL; both sweeps are killed at random."""
    count, kills = (40, 10) if full else (6, 2)
    arguments = (*QUICK, LR, f"sweep.trials={count}", "sweep.parallel=1", "sweep.name=shared", "sweep.retries=10")
    arguments += (f"sweep.storage='{postgres}'", "sweep.stale_after=10")
    generator = random.Random(0)
    folders = [tmp_path / "one", tmp_path / "other"]
    children = {folder: start_sweep(folder, *arguments) for folder in folders}
    for number in range(kills):
        time.sleep(generator.uniform(1, 3))
        folder = folders[number % 2]
        os.kill(children[folder], signal.SIGKILL)
        wait_for_exit(children[folder])
        children[folder] = start_sweep(folder, *arguments)
    for folder, child in children.items():
        assert wait_for_exit(child) == 0, folder.with_suffix(".out").read_text()
    trials = trials_of(tmp_path, postgres, "shared")
    assert [(trial.number, trial.state) for trial in trials] == [(n, TrialState.COMPLETE) for n in range(count)]
    done = [folder.with_suffix(".out").read_text().count(" complete ") for folder in folders]
    assert sum(done) == count and min(done) > 0
    for folder in folders:  # each folder has the complete report
        assert len((folder / "trials.csv").read_text().splitlines()) == count + 1
    promise(23, "Two sweeps on one PostgreSQL, killed at random", f"{done[0]} + {done[1]} results, {kills} kills")
