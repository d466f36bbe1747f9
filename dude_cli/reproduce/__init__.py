"""Recipes: plan the runs of a comparison, make those that are missing, and judge the published numbers."""

from dude_cli.reproduce.execute import Job, Slot, slots
from dude_cli.reproduce.plan import Plan, make_plan
from dude_cli.reproduce.recipe import Recipe, load_recipe
from dude_cli.reproduce.report import Result, plan_document, plan_summary, plan_table, result_table
from dude_cli.reproduce.run import check_result, check_runs, reproduce
from dude_cli.reproduce.smoke import smoke_recipe

__all__ = [
    "Job",
    "Plan",
    "Recipe",
    "Result",
    "Slot",
    "check_result",
    "check_runs",
    "load_recipe",
    "make_plan",
    "plan_document",
    "plan_summary",
    "plan_table",
    "reproduce",
    "result_table",
    "slots",
    "smoke_recipe",
]
