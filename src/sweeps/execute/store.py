"""The store of a sweep: Optuna's tables in a database, and the transactions that Optuna's API lacks.

    WAITING -- claim --> RUNNING -- finish --> COMPLETE, PRUNED or FAIL
       ^                    |
       +--------------------+  release, or requeue if the owner has ended or writes no heartbeat

A trial is one row from its creation to its result. So N trials are N rows, no matter which process is killed and when.
Optuna 5.0.0 (study/study.py, storages/_rdb/storage.py) does not guarantee this, for three reasons:

- Two processes can claim one trial. `ask` claims a waiting trial by `set_trial_state_values(RUNNING)`. It reads the row
  FOR UPDATE, and fails if the state is no longer WAITING. With PostgreSQL and MySQL, this is a compare-and-set. SQLite
  has no FOR UPDATE, and Python's sqlite3 begins a transaction only at the first write. So two processes can both read
  WAITING. In database.py, each SQLite transaction begins with BEGIN IMMEDIATE: it ends before the next one reads.
- Several machines can create the same trials. `ask` creates a trial if none is waiting. If each machine enqueues the
  missing trials, they are enqueued several times. `fill` counts and inserts in one transaction that locks the study's
  row.
- A trial can be lost. Only `Study.optimize` writes heartbeats. Its callback for a stale trial marks the old row FAIL in
  one transaction, and adds a new row in another. If the process is killed in between, the trial is lost. Here, the
  claim and its first heartbeat are one transaction. `requeue` reads the heartbeat while it locks the trial's row.
"""

import datetime
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.pruners import BasePruner
from optuna.storages._rdb import models as typed_models
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from core.errors import CheckpointError, ConfigError
from sweeps.execute.database import (
    database_errors,
    experimental,
    open_storage,
    retried,
    retry_creation,
    sqlite_url,
    study_name,
    wait_for_restarts,
)
from sweeps.execute.owners import Owners

models: Any = typed_models  # Any, because mypy takes the attribute of a row for a Column, not for its value
OWNER = "owner"  # system attribute of a trial: the token of the sweep that claimed it


class Store:
    """The trials of one study in a database.

    url:          database URL; None: the SQLite file sweep.db in `folder`
    folder:       folder of the sweep, which must exist
    name:         name of the study; None: the name of the folder when the sweep was started for the first time
    objectives:   (direction, metric) of each objective; a direction is "maximize" or "minimize"
    pruner:       Optuna's pruner of the study
    reconnect_s:  maximum time in seconds that a new connection waits for a database server that restarts

    The attribute `owner` is the token of this sweep, and `lock` the descriptor of its locked token file (owners.py).

    All methods can raise errors of the database; `database_errors` converts them. The constructor raises StorageError
    if the database cannot be used, and ConfigError for a URL or a folder that is not allowed.
    """

    def __init__(
        self,
        url: str | None,
        *,
        folder: Path,
        name: str | None,
        objectives: list[tuple[str, str]],
        pruner: BasePruner | None = None,
        reconnect_s: float = 0,
    ) -> None:
        self.url = url or sqlite_url(folder.resolve() / "sweep.db")
        self.name = name or study_name(folder)
        directions: Any = [direction for direction, _ in objectives]
        with database_errors(self.url):
            self.storage = retry_creation(lambda: open_storage(self.url))
            self.study = retry_creation(
                lambda: optuna.create_study(
                    storage=self.storage,
                    study_name=self.name,
                    directions=directions,
                    pruner=pruner,
                    load_if_exists=True,
                )
            )
        wait_for_restarts(self.storage.engine, reconnect_s)
        self.metrics = [metric for _, metric in objectives]
        self.id = self.study._study_id
        self.owners = Owners(folder)
        self.owner, self.lock = self.owners.token, self.owners.lock

    def close(self) -> None:
        """Close the connections, and release this sweep's lock.

        The token file is deleted, unless trials of this sweep are still RUNNING in the database. In that case, the next
        sweep finds the file unlocked, and requeues these trials.
        """
        with suppress(SQLAlchemyError):
            if not self._owners_of_running({self.owner}):
                self.owners.forget(self.owner)
        self.storage.engine.dispose()
        self.owners.close()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Yield a session with one transaction. It is committed at the end, or rolled back after an exception."""
        with Session(self.storage.engine) as session, session.begin():
            yield session

    # Definition of the sweep

    @retried
    def settle_definition(self, definition: Mapping[str, Any]) -> None:
        """Store the sweep's definition in a new study, or compare it with the stored definition.

        Raises CheckpointError, with all differences, if the definitions are not equal.
        """
        text = json.dumps(definition, sort_keys=True)
        with self.transaction() as session:
            self._lock_study(session)
            rows = session.query(models.StudyUserAttributeModel).filter_by(study_id=self.id, key="definition").all()
            if not rows:
                row = models.StudyUserAttributeModel(study_id=self.id, key="definition", value_json=json.dumps(text))
                session.add(row)
            stored = json.loads(json.loads(rows[0].value_json) if rows else text)
        current = json.loads(text)  # converted as in the database: tuples become lists
        if stored != current:
            changed = [
                f"{key}: {json.dumps(stored.get(key))} -> {json.dumps(current.get(key))}"
                for key in sorted({*stored, *current})
                if stored.get(key) != current.get(key)
            ]
            explanation = f"was started with another definition, so trials are not comparable: {'; '.join(changed)}."
            raise CheckpointError(f"sweep {self.name}", f"{explanation} Undo these changes, or set another sweep.dir")
        with experimental():
            self.study.set_metric_names(self.metrics)

    def _lock_study(self, session: Session) -> None:
        """Lock the study's row until the transaction ends."""
        models.StudyModel.find_or_raise_by_id(self.id, session, for_update=True)

    # Trials

    @retried
    def fill(self, count: int) -> None:
        """Add waiting trials until the study has `count` trials. Several processes can call this at the same time.

        Raises ConfigError if the study already has more trials.
        """
        with self.transaction() as session:
            self._lock_study(session)
            existing = session.query(models.TrialModel).filter_by(study_id=self.id).count()
            if existing > count:
                explanation = f"must be at least {existing}, the number of trials that the sweep already has"
                raise ConfigError("sweep.trials", explanation, value=count)
            for number in range(existing, count):
                session.add(models.TrialModel(study_id=self.id, number=number, state=TrialState.WAITING))

    @retried
    def claim(self) -> tuple[int, int] | None:
        """Claim the waiting trial with the lowest number, and write its first heartbeat.

        Return (id in the database, number) of the trial; None if no trial is waiting.
        """
        with self.transaction() as session:
            waiting = session.query(models.TrialModel).filter_by(study_id=self.id, state=TrialState.WAITING)
            # Skip rows that another machine has locked, because it claims them. With SQLite, nothing is locked here:
            # transactions run one at a time.
            first = waiting.order_by(models.TrialModel.number).limit(1).with_for_update(skip_locked=True).one_or_none()
            if first is None:
                return None
            first.state = TrialState.RUNNING
            first.datetime_start = datetime.datetime.now()
            self._write_heartbeats(session, [first.trial_id])
            self._set_owner(session, first.trial_id, self.owner)
            return first.trial_id, first.number

    @retried
    def beat(self, trial_ids: list[int]) -> set[int]:
        """Write a heartbeat of each trial that this sweep owns; return the ids that it no longer owns."""
        with self.transaction() as session:
            owned = {trial_id for trial_id in trial_ids if self._is_mine(session, trial_id)}
            self._write_heartbeats(session, sorted(owned))
        return set(trial_ids) - owned

    @retried
    def release(self, trial_id: int) -> None:
        """Set a trial to WAITING, if this sweep still owns it."""
        with self.transaction() as session:
            if self._is_mine(session, trial_id):
                models.TrialModel.find_or_raise_by_id(trial_id, session).state = TrialState.WAITING

    @retried
    def requeue(self, *, stale_after: float) -> list[int]:
        """Set the running trials of dead sweeps to WAITING, and return their numbers.

        A sweep is dead if its token file is in this folder and unlocked. A sweep with another folder is treated as dead
        if it wrote no heartbeat of the trial for `stale_after` seconds, by the database's clock. So is a live sweep in
        this folder.
        """
        dead = self.owners.dead()
        with self.transaction() as session:
            running = session.query(models.TrialModel).filter_by(study_id=self.id, state=TrialState.RUNNING)
            now = session.execute(sqlalchemy.func.now()).scalar_one().replace(tzinfo=None)
            requeued = []
            for trial in running.with_for_update(skip_locked=True).all():
                row = models.TrialHeartbeatModel.where_trial_id(trial.trial_id, session)
                is_stale = row is None or now - row.heartbeat > datetime.timedelta(seconds=stale_after)
                if is_stale or self._owner_of(session, trial.trial_id) in dead:
                    trial.state = TrialState.WAITING
                    requeued.append(trial.number)
        # Rows that another machine has locked were skipped. Keep the token of a dead sweep while such a trial is
        # RUNNING: the next call needs the token to requeue the trial.
        for owner in dead - self._owners_of_running(dead):
            self.owners.forget(owner)
        return requeued

    def _owners_of_running(self, owners: set[str]) -> set[str]:
        """Return the tokens in `owners` that own a running trial."""
        if not owners:
            return set()
        with self.transaction() as session:
            running = session.query(models.TrialModel).filter_by(study_id=self.id, state=TrialState.RUNNING).all()
            owners_of_running = {self._owner_of(session, trial.trial_id) for trial in running}
        return {owner for owner in owners if owner in owners_of_running}

    @retried
    def finish(self, trial: Trial, state: TrialState, values: list[float] | None, **attributes: Any) -> bool:
        """Store the final state, objective values and user attributes of a trial, and return True.

        If the trial is no longer running or another sweep owns it, return False and do not change its state.
        """
        if not self.is_mine(trial._trial_id):
            return False
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        try:
            self.study.tell(trial, values, state=state)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            # The trial has finished since the check. If this sweep owns it and the state is equal, the previous attempt
            # stored the state and then lost the connection. Otherwise another sweep has finished the trial.
            return self.storage.get_trial(trial._trial_id).state == state and self._is_owner(trial._trial_id)
        return True

    @retried
    def is_mine(self, trial_id: int) -> bool:
        """Return whether the trial is running and this sweep owns it.

        A sweep loses its trial if it writes no heartbeat for `stale_after` seconds, and another sweep requeues it.
        """
        with self.transaction() as session:
            return self._is_mine(session, trial_id)

    @retried
    def trials(self) -> list[FrozenTrial]:
        """Return all trials, in the order of their numbers."""
        return self.study.get_trials(deepcopy=False)

    def _write_heartbeats(self, session: Session, trial_ids: list[int]) -> None:
        """Set the heartbeats of trials to the current time of the database's clock."""
        for trial_id in trial_ids:
            row = models.TrialHeartbeatModel.where_trial_id(trial_id, session)
            if row is None:
                session.add(models.TrialHeartbeatModel(trial_id=trial_id))
            else:
                row.heartbeat = session.execute(sqlalchemy.func.now()).scalar_one()

    def _is_mine(self, session: Session, trial_id: int) -> bool:
        """Return whether the trial is running and this sweep owns it. Lock its row until the transaction ends."""
        trial = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
        return trial.state == TrialState.RUNNING and self._owner_of(session, trial_id) == self.owner

    def _is_owner(self, trial_id: int) -> bool:
        """Return whether this sweep is the last owner of the trial, also of a finished one."""
        with self.transaction() as session:
            return self._owner_of(session, trial_id) == self.owner

    def _owner_row(self, session: Session, trial_id: int) -> Any:
        return session.query(models.TrialSystemAttributeModel).filter_by(trial_id=trial_id, key=OWNER).one_or_none()

    def _owner_of(self, session: Session, trial_id: int) -> str | None:
        """Return the token of the sweep that claimed the trial last; None if no sweep has claimed it."""
        row = self._owner_row(session, trial_id)
        return json.loads(row.value_json) if row else None

    def _set_owner(self, session: Session, trial_id: int, owner: str) -> None:
        row = self._owner_row(session, trial_id)
        if row is None:
            session.add(models.TrialSystemAttributeModel(trial_id=trial_id, key=OWNER, value_json=json.dumps(owner)))
        else:
            row.value_json = json.dumps(owner)
