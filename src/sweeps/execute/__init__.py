"""The execution of a sweep.

database.py  Optuna's storage at a URL, SQLite's transactions, errors of a database
store.py     the trials of one study: claim, heartbeat, release, requeue, finish
running.py   a trial that runs here: its process and its newest messages
sweep.py     the loop: claims trials, starts their processes, judges their reports, notes their results
pool.py      the processes of trials, as the sweep sees them
trial.py     what a trial's process does: trains, reports, sends its result

store.claim -> sweep draws a point -> pool starts trial.py -> reports -> sweep judges -> result -> store.finish
"""
