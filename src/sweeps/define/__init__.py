"""The definition of a sweep.

space.py    the search space: dimensions, how their values are sampled, their overrides
compose.py  the config of a trial, composed by Hydra; imports neither Optuna nor the database
plan.py     the checked settings of a sweep: Plan

config -> plan.read_plan -> Plan; a trial's point -> space.overrides -> compose.compose_trial -> its config
"""
