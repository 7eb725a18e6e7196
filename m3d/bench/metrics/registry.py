"""How the answers to every task are judged: a new task is a line here, a new metric a class and its place in a line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from m3d.bench.kinds import TEXT, by_of, task_of
from m3d.bench.metrics.answers import NamesIt, NumberWithin
from m3d.bench.metrics.base import Metric, ProtocolName
from m3d.bench.metrics.boxes import box_metrics
from m3d.bench.metrics.choices import choice_metrics
from m3d.bench.metrics.masks import mask_metrics
from m3d.bench.metrics.text import text_metrics
from m3d.config import lookup

__all__ = ["JUDGED", "JudgedTask", "kind_of", "metrics_of"]

Kind = Literal["text", "choice", "boxes", "masks"]


@dataclass(frozen=True)
class JudgedTask:
    """``kind`` is what is judged of an answer: its text, the option it chooses, its boxes or its masks.

    Masks are judged a scan at a time, for they are large. The first metric is the headline.
    """

    kind: Kind
    metrics: Callable[[ProtocolName], tuple[Metric, ...]]


def _open(protocol: ProtocolName) -> tuple[Metric, ...]:
    return (*((NumberWithin(),) if protocol == "standard" else ()), *text_metrics(protocol))


def _reg(protocol: ProtocolName) -> tuple[Metric, ...]:
    return (*((NamesIt(),) if protocol == "standard" else ()), *text_metrics(protocol))


JUDGED: Mapping[str, JudgedTask] = {
    "report": JudgedTask("text", text_metrics),
    "vqa.closed": JudgedTask("choice", choice_metrics),
    "vqa.open": JudgedTask("text", _open),
    "rec.box3d": JudgedTask("boxes", box_metrics),
    "reg": JudgedTask("text", _reg),
    "seg.sem": JudgedTask("masks", mask_metrics),
    "seg.ref": JudgedTask("masks", mask_metrics),
}


def kind_of(task: str) -> Kind:
    """What is judged of an answer to a task.

    Raises:
        KeyError: Nothing judges it.
    """
    return lookup(JUDGED, task).kind


def metrics_of(row: str, protocol: ProtocolName) -> tuple[Metric, ...]:
    """The metrics of a row: of a task, or of a task by a kind of prompt (`m3d.bench.kinds.named`).

    Raises:
        KeyError: Nothing judges it.
    """
    judged, by = lookup(JUDGED, task_of(row)), by_of(row)
    return judged.metrics(protocol) if by == TEXT else mask_metrics(protocol, by)
