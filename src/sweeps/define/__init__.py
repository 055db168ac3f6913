"""The definition of a sweep.

space.py    the search space: dimensions, their distributions, a sampled point as overrides
compose.py  the config of a trial, composed by Hydra; imports neither Optuna nor the database
plan.py     the checked settings of a sweep: Plan

config of the sweep -> plan.read_plan -> Plan
point of a trial -> space.overrides -> compose.compose_trial -> config of the trial
"""
