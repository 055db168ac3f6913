"""Sweeps: searches over configs. Each trial runs in its own process; a database holds the state of the search.

search.py   a complete search, which `scripts/sweep.py` runs
define/     the definition: search space, plan, config of a trial
execute/    the execution: database, loop over trials, processes
results/    the results: table in the terminal, report, best trials as experiment cards

config -> define.plan -> execute.sweep (claim a trial, sample its point, start its process, judge it, store its result)
  -> results.report
"""
