"""Evaluation: a strategy on a task, with honest errors, cost beside accuracy, and nothing lost.

`tasks` binds a task's folder to its code, `runner` runs items x repeats over one engine, `store` keeps every finished
sample, `statistics` and `summary` say what they mean, `report` and `progress` show it.
"""
