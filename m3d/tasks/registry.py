"""The tasks by name: a new one is one file and one line here."""

from collections.abc import Iterable

from m3d.tasks.base import Task
from m3d.tasks.referring import Describe, Locate
from m3d.tasks.report import Report, Retrieval
from m3d.tasks.segmentation import Refer, Segment
from m3d.tasks.vqa import ClosedVQA, OpenVQA

TASKS: dict[str, Task] = {
    task.name: task
    for task in (Retrieval(), Report(), ClosedVQA(), OpenVQA(), Locate(), Describe(), Segment(), Refer())
}


def check_tasks(names: Iterable[str], where: str) -> None:
    """Refuse names of no task; ``where`` is the setting that has them.

    Raises:
        ValueError: One is no task; the message has those that are.
    """
    if unknown := sorted(set(names) - set(TASKS)):
        raise ValueError(f"{where}: {', '.join(unknown)} is no task; the tasks are {', '.join(TASKS)}")
