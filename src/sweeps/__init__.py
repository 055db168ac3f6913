"""Sweeps: searches over configs. Each trial is trained in its own process; a database stores all state of the search.

search.py   a complete search, called by `scripts/sweep.py`
define/     definition of a sweep: search space, plan, config of a trial
execute/    execution: database, loop over trials, processes
results/    results: table on the terminal, report, experiment cards of the best trials

config -> define.plan -> execute.sweep (claim a trial, sample its point, start its process, prune it, store its result)
  -> results.report
"""
