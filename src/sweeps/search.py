"""A whole search: the plan, its store, the loop over trials, and the report."""

import contextlib

from optuna.trial import TrialState

from core.config import Config
from core.errors import StorageError, TrialError
from core.options.declarations import SweepConfig
from sweeps.define.plan import read_plan
from sweeps.execute.database import database_errors
from sweeps.execute.pool import Pool
from sweeps.execute.store import Store
from sweeps.execute.sweep import Sweep
from sweeps.results.table import Table


def search(config: Config[SweepConfig]) -> None:
    """Run the trials that are left, then write the report. With failed trials, raise the first one's error."""
    plan = read_plan(config)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as exception:
        raise StorageError(str(plan.folder), f"cannot be made: {exception.strerror}") from None
    store = Store(
        plan.options["storage"],
        folder=plan.folder,
        name=plan.options["name"],
        objectives=plan.objectives,
        pruner=plan.pruner(),
        patience=plan.options["stale_after"],
    )
    with contextlib.closing(store), database_errors(store.url):
        store.settle_definition(plan.definition())
        store.fill(plan.trials)
        pool = Pool(warm=plan.options["warm"], lock=store.lock, output=plan.folder / "errors.txt")
        with contextlib.closing(pool), Table(plan, store) as table:
            Sweep(plan, store, pool, table).run()
        from sweeps.results.report import write_report  # not before the trials have run: it imports matplotlib

        write_report(plan, store, table.console)
        failed = [trial for trial in store.trials() if trial.state == TrialState.FAIL]
    if failed:
        first = failed[0].user_attrs
        explanation = f"{len(failed)} of {plan.trials} trials failed, the first with {first['error']}"
        raise TrialError("sweep", explanation, exit_code=first["exit_code"])
