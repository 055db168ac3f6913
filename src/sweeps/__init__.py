"""Sweeps: searches over configs, each trial in a process of its own, all of it in a database.

search.py   a whole search: what `scripts/sweep.py` runs
define/     what is searched: the space, the plan, a trial's config
execute/    how it is run: the database, the loop over trials, their processes
results/    what comes of it: the table on the terminal, the report, the best as an experiment card

config -> define.plan -> execute.sweep (claim a trial, draw its point, start its process, judge, note its result)
  -> results.report
"""
