"""One file a task: how it asks, how it answers and how an answer is read back."""

from m3d.tasks.base import Rendered, Task, render
from m3d.tasks.registry import TASKS, check_tasks

__all__ = ["TASKS", "Rendered", "Task", "check_tasks", "render"]
