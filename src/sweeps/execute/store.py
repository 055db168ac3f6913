"""Where trials are kept: Optuna's tables in a database, and the transactions on them that Optuna's API lacks.

    WAITING -- claim --> RUNNING -- finish --> COMPLETE, PRUNED or FAIL
       ^                    |
       +-- release, or no heartbeat of its owner --+

A trial is one row from its first moment to its last, so that N trials are N rows whatever is killed when. What was
found in Optuna 5.0.0 (study/study.py, storages/_rdb/storage.py), and why this file exists:

- `ask` takes a waiting trial by `set_trial_state_values(RUNNING)`, which reads the row FOR UPDATE and refuses when it
  is not WAITING any more: a compare-and-set with PostgreSQL and MySQL. SQLite has no FOR UPDATE, and Python's sqlite3
  begins a transaction only at the first write: two processes can both read WAITING, and both take the trial. In
  `database` every transaction on SQLite begins with BEGIN IMMEDIATE, so one is over before the next one reads.
- `ask` makes a new trial when none waits, and machines that each enqueue "what is missing" enqueue it several times.
  `fill` counts and inserts in one transaction that holds the study's row.
- A heartbeat is written by `Study.optimize` alone, and the callback that requeues a stale trial marks the old row FAIL
  in one transaction and adds a new one in another: killed in between, a trial is lost. Here the claim and its first
  heartbeat are one transaction, and `requeue` looks again, under the row's lock, before it takes a trial back.
"""

import datetime
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.pruners import BasePruner
from optuna.storages._rdb import models as optunas
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from core.durable import write_durably
from core.errors import CheckpointError, ConfigError
from core.regular_files import read_regular
from sweeps.execute.database import (
    database_errors,
    experimental,
    open_storage,
    patiently,
    retried,
    sqlite_url,
    wait_for_restarts,
)

models: Any = optunas  # its columns are typed as columns where they are values
OWNER = "owner"  # a system attribute of a trial: the token of the sweep that has claimed it


class Store:
    """One study in a database. `owner` is this process's token: a lock in `folder` that ends with it."""

    def __init__(
        self,
        url: str | None,
        *,
        folder: Path,
        name: str | None,
        objectives: list[tuple[str, str]],
        pruner: BasePruner | None = None,
        patience: float = 0,
    ) -> None:
        self.url = url or sqlite_url(folder.resolve() / "sweep.db")
        self.name = name or _study_name(folder)
        directions: Any = [direction for direction, _ in objectives]
        with database_errors(self.url):
            self.storage = patiently(lambda: open_storage(self.url))
            self.study = patiently(
                lambda: optuna.create_study(
                    storage=self.storage,
                    study_name=self.name,
                    directions=directions,
                    pruner=pruner,
                    load_if_exists=True,
                )
            )
        wait_for_restarts(self.storage.engine, patience)
        self.metrics = [metric for _, metric in objectives]
        self.id = self.study._study_id
        self.owners = folder / ".owners"
        self.owners.mkdir(exist_ok=True)
        self.owner = secrets.token_hex(8)
        # Handed on to every process that this sweep starts: it is free when the last of them is gone. Locked before it
        # has its name, or another sweep could take it for a dead one's.
        nameless = self.owners / f".{self.owner}"
        self.lock = os.open(nameless, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        nameless.rename(self.owners / self.owner)

    def close(self) -> None:
        """Release the token. If trials still run, it stays, so that the next sweep sees that their owner is gone."""
        with suppress(OSError, SQLAlchemyError):
            if not self._running_of({self.owner}):
                (self.owners / self.owner).unlink()
        self.storage.engine.dispose()
        os.close(self.lock)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """All of what is done in it, or nothing."""
        with Session(self.storage.engine) as session, session.begin():
            yield session

    # What the sweep is

    @retried
    def settle_definition(self, definition: Mapping[str, Any]) -> None:
        """Note what is searched; CheckpointError, with the differences, when the study is of something else."""
        text = json.dumps(definition, sort_keys=True)
        with self.transaction() as session:
            self._hold_study(session)
            rows = session.query(models.StudyUserAttributeModel).filter_by(study_id=self.id, key="definition").all()
            if not rows:
                row = models.StudyUserAttributeModel(study_id=self.id, key="definition", value_json=json.dumps(text))
                session.add(row)
            before = json.loads(json.loads(rows[0].value_json) if rows else text)
        now = json.loads(text)
        if before != now:
            changed = [
                f"{key}: {json.dumps(before.get(key))} -> {json.dumps(now.get(key))}"
                for key in sorted({*before, *now})
                if before.get(key) != now.get(key)
            ]
            explanation = f"was begun with another search, and its trials cannot be compared: {'; '.join(changed)}."
            raise CheckpointError(f"sweep {self.name}", f"{explanation} Undo the change, or use another sweep.dir")
        with experimental():
            self.study.set_metric_names(self.metrics)

    def _hold_study(self, session: Session) -> None:
        models.StudyModel.find_or_raise_by_id(self.id, session, for_update=True)

    # Trials

    @retried
    def fill(self, count: int) -> None:
        """As many trials as there are to be, however often and by however many this is called; never fewer."""
        with self.transaction() as session:
            self._hold_study(session)
            there = session.query(models.TrialModel).filter_by(study_id=self.id).count()
            if there > count:
                raise ConfigError("sweep.trials", f"may grow only: the sweep has {there} already", value=count)
            for number in range(there, count):
                session.add(models.TrialModel(study_id=self.id, number=number, state=TrialState.WAITING))

    @retried
    def claim(self) -> tuple[int, int] | None:
        """Claim the first waiting trial with a heartbeat; returns its id and number, or None if none waits."""
        with self.transaction() as session:
            waiting = session.query(models.TrialModel).filter_by(study_id=self.id, state=TrialState.WAITING)
            # Rows that another machine is just taking are passed over; SQLite does one transaction at a time.
            first = waiting.order_by(models.TrialModel.number).limit(1).with_for_update(skip_locked=True).one_or_none()
            if first is None:
                return None
            first.state = TrialState.RUNNING
            first.datetime_start = datetime.datetime.now()
            self._sign(session, [first.trial_id])
            self._set_owner(session, first.trial_id, self.owner)
            return first.trial_id, first.number

    @retried
    def beat(self, trial_ids: list[int]) -> set[int]:
        """Write a heartbeat of the trials that run here; returns those that another sweep has taken over."""
        with self.transaction() as session:
            mine = {trial_id for trial_id in trial_ids if self._is_mine(session, trial_id)}
            self._sign(session, sorted(mine))
        return set(trial_ids) - mine

    @retried
    def release(self, trial_id: int) -> None:
        """Let a trial that was claimed here wait again."""
        with self.transaction() as session:
            if self._is_mine(session, trial_id):
                models.TrialModel.find_or_raise_by_id(trial_id, session).state = TrialState.WAITING

    @retried
    def requeue(self, *, stale_after: float) -> list[int]:
        """Let the trials wait again whose sweeps are gone: their numbers.

        On this machine that is known at once, by their locks; for another's, by the database's clock.
        """
        dead = self._dead_owners()
        with self.transaction() as session:
            running = session.query(models.TrialModel).filter_by(study_id=self.id, state=TrialState.RUNNING)
            now = session.execute(sqlalchemy.func.now()).scalar_one().replace(tzinfo=None)
            taken = []
            for trial in running.with_for_update(skip_locked=True).all():
                seen = models.TrialHeartbeatModel.where_trial_id(trial.trial_id, session)
                is_stale = seen is None or now - seen.heartbeat > datetime.timedelta(seconds=stale_after)
                if is_stale or self._owner_of(session, trial.trial_id) in dead:
                    trial.state = TrialState.WAITING
                    taken.append(trial.number)
        for owner in dead - self._running_of(dead):  # not before their trials are free
            with suppress(OSError):
                (self.owners / owner).unlink()
        return taken

    def _running_of(self, owners: set[str]) -> set[str]:
        """Those of them that trials which run were claimed by."""
        if not owners:
            return set()
        with self.transaction() as session:
            running = session.query(models.TrialModel).filter_by(study_id=self.id, state=TrialState.RUNNING).all()
            found = {self._owner_of(session, trial.trial_id) for trial in running}
        return {owner for owner in owners if owner in found}

    def _dead_owners(self) -> set[str]:
        """The sweeps of this folder whose processes are all gone."""
        dead = set()
        for path in self.owners.iterdir():
            if path.name == self.owner or path.name.startswith("."):
                continue
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    dead.add(path.name)
                except OSError:
                    pass
                finally:
                    os.close(descriptor)
        return dead

    @retried
    def finish(self, trial: Trial, state: TrialState, values: list[float] | None, **attributes: Any) -> bool:
        """Note a trial's result and what else is known of it; False when the trial is another's by now."""
        if not self.is_mine(trial._trial_id):
            return False
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        try:
            self.study.tell(trial, values, state=state)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            # Finished in the meantime: by another sweep, or by this one, whose connection was lost before the answer.
            return self.storage.get_trial(trial._trial_id).state == state and self._is_owner(trial._trial_id)
        return True

    @retried
    def is_mine(self, trial_id: int) -> bool:
        """Does the trial run, claimed by this sweep? Another has it if this one was held up for long."""
        with self.transaction() as session:
            return self._is_mine(session, trial_id)

    @retried
    def trials(self) -> list[FrozenTrial]:
        """All of them, by number."""
        return self.study.get_trials(deepcopy=False)

    def _sign(self, session: Session, trial_ids: list[int]) -> None:
        for trial_id in trial_ids:
            seen = models.TrialHeartbeatModel.where_trial_id(trial_id, session)
            if seen is None:
                session.add(models.TrialHeartbeatModel(trial_id=trial_id))
            else:
                seen.heartbeat = session.execute(sqlalchemy.func.now()).scalar_one()

    def _is_mine(self, session: Session, trial_id: int) -> bool:
        """Does the trial run, claimed by this sweep? Its row is held from here on."""
        trial = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
        return trial.state == TrialState.RUNNING and self._owner_of(session, trial_id) == self.owner

    def _is_owner(self, trial_id: int) -> bool:
        with self.transaction() as session:
            return self._owner_of(session, trial_id) == self.owner

    def _owner_row(self, session: Session, trial_id: int) -> Any:
        return session.query(models.TrialSystemAttributeModel).filter_by(trial_id=trial_id, key=OWNER).one_or_none()

    def _owner_of(self, session: Session, trial_id: int) -> str | None:
        row = self._owner_row(session, trial_id)
        return json.loads(row.value_json) if row else None

    def _set_owner(self, session: Session, trial_id: int, owner: str) -> None:
        row = self._owner_row(session, trial_id)
        if row is None:
            session.add(models.TrialSystemAttributeModel(trial_id=trial_id, key=OWNER, value_json=json.dumps(owner)))
        else:
            row.value_json = json.dumps(owner)


def _study_name(folder: Path) -> str:
    """Return the name of the study in a sweep folder: the name that the folder had when the sweep was started.

    It is kept in the folder, so a renamed folder continues its study instead of starting another one.
    """
    file = folder / ".study"
    if not file.exists():
        write_durably(file, os.fsencode(folder.resolve().name))
    return os.fsdecode(read_regular(file, follow=False))
