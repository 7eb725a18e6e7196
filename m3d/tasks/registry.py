"""The tasks by name: a new one is one file and one line here."""

from m3d.tasks.base import Task
from m3d.tasks.referring import Describe, Locate
from m3d.tasks.report import Report, Retrieval
from m3d.tasks.segmentation import Refer, Segment
from m3d.tasks.vqa import ClosedVQA, OpenVQA

TASKS: dict[str, Task] = {
    task.name: task
    for task in (Retrieval(), Report(), ClosedVQA(), OpenVQA(), Locate(), Describe(), Segment(), Refer())
}
