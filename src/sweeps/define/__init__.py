"""The definition of a sweep.

space.py    the search space: dimensions, how their values are drawn, their overrides
compose.py  a trial's config, composed by Hydra; needs neither Optuna nor the database
plan.py     the settings of a sweep, checked: Plan

config -> plan.read_plan -> Plan; a trial's point -> space.overrides -> compose.compose_trial -> its config
"""
