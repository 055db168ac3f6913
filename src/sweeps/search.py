"""A complete search: read the plan, open the store, run the trials, write the report."""

import contextlib
from pathlib import Path

from optuna.trial import TrialState

from core.config import Config
from core.errors import StorageError, TrialError
from core.options.commands import SweepConfig
from sweeps.define.plan import read_plan
from sweeps.execute.database import database_errors
from sweeps.execute.pool import Pool
from sweeps.execute.store import Store
from sweeps.execute.sweep import Sweep
from sweeps.results.table import Table


def search(config: Config[SweepConfig]) -> None:
    """Run all trials that have not finished, then write the report.

    Raises TrialError if trials failed, with the exit code of the first one. Raises ConfigError, StorageError,
    CheckpointError (the folder belongs to a sweep with another definition) or StopSignal before the report is written.
    """
    plan = read_plan(config)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as exception:
        raise StorageError(str(plan.folder), f"cannot be created: {exception.strerror}") from None
    store = Store(
        plan.options["storage"],
        folder=plan.folder,
        name=plan.options["name"],
        objectives=plan.objectives,
        pruner=plan.pruner(),
        reconnect_s=plan.options["stale_after"],
    )
    with contextlib.closing(store), database_errors(store.url):
        store.settle_definition(plan.definition())
        store.fill(plan.trials)
        pool = Pool(warm=plan.options["warm"], lock=store.lock, output=plan.folder / "errors.txt")
        with contextlib.closing(pool), Table(plan, store) as table:
            Sweep(plan, store, pool, table).run()
        from sweeps.results.report import write_report  # imports matplotlib, so only after the trials

        write_report(plan, store, table.console)
        trials = store.trials()
        failed = [trial for trial in trials if trial.state == TrialState.FAIL]
        # If trials are unfinished, another process of the sweep may still write to errors.txt.
        if all(trial.state.is_finished() for trial in trials):
            remove_if_empty(plan.folder / "errors.txt")
    if failed:
        first = failed[0].user_attrs
        explanation = f"{len(failed)} of {plan.trials} trials failed, the first with {first['error']}"
        raise TrialError("sweep", explanation, exit_code=first["exit_code"])


def remove_if_empty(path: Path) -> None:
    """Delete a file if it exists and is empty."""
    if path.exists() and path.stat().st_size == 0:
        path.unlink()
