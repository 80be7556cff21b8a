"""Train without a schedule: averages at a constant rate against decays tuned for each length.

The plan was written before the first number: `results/schedules_plan.md`.
"""
