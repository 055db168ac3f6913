"""Execution of a sweep: claim trials, train them in processes, judge their reports, store their results.

database.py  Optuna's storage at a database URL: SQLite transactions, lost connections, database errors
store.py     Store: the trials of one study (claim, heartbeat, release, requeue, finish)
owners.py    Owners: one locked token file per sweep process, by which other sweeps detect that it has ended
running.py   Running: a trial that this sweep runs, its process and its last messages
sweep.py     Sweep: the loop that claims trials, starts their processes, prunes them and stores results
pool.py      Pool: starts the processes of trials
trial.py     the code that runs in the process of a trial: train, report evaluations, send the result

store.claim -> sweep samples a point -> pool starts trial.py -> reports -> sweep prunes or not -> result -> store.finish
"""
