"""Execution of a sweep: claim trials, train them in processes, judge their reports, store their results.

database.py  Optuna's storage at a database URL: SQLite transactions, lost connections, database errors
store.py     Store: the trials of one study (claim, heartbeat, release, requeue, finish)
owners.py    Owners: the locked token file of each sweep, by which others find dead sweeps
running.py   Running: a trial that this sweep runs, its process and its last messages
sweep.py     Sweep: the loop that claims trials, starts their processes, judges reports and stores results
pool.py      Pool: starts the processes of trials
trial.py     the code that runs in a trial's process: trains, reports, sends the result

store.claim -> sweep draws a point -> pool starts trial.py -> reports -> sweep judges -> result -> store.finish
"""
