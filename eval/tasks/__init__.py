"""Synthetic tasks, each in a file of its own: its data, the shape of its models, its options.

A model is trained on one from scratch and asked what it learnt (`eval.measure.task`); a row has
the task's name as its scale and what was asked in its options. A new task is a file and a line
here.
"""

from archs.errors import unknown_name
from eval.tasks.mqar import Mqar
from eval.tasks.parity import Parity
from eval.tasks.selective_copy import SelectiveCopy
from eval.tasks.task import Task

__all__ = ["TASKS", "Task", "task_named"]

TASKS: dict[str, type[Task]] = {
    "mqar": Mqar, "parity": Parity, "selective_copy": SelectiveCopy
}  # fmt: skip


def task_named(name: str) -> type[Task]:
    """A registered task. Raises UserError with the nearest name otherwise."""
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]
