"""The metrics of every task: a new one is a class with `Metric`'s members and a line here."""

from collections.abc import Callable, Mapping

from m3d.bench.metrics.answers import NamesIt, NumberWithin
from m3d.bench.metrics.base import Metric, ProtocolName
from m3d.bench.metrics.boxes import box_metrics
from m3d.bench.metrics.choices import choice_metrics
from m3d.bench.metrics.masks import mask_metrics
from m3d.bench.metrics.text import text_metrics
from m3d.config import lookup

__all__ = ["METRICS", "OF_MASKS", "metrics_of"]

OF_MASKS = ("seg.sem", "seg.ref")  # judged a scan at a time: masks are large


def _open(protocol: ProtocolName) -> tuple[Metric, ...]:
    return (*((NumberWithin(),) if protocol == "standard" else ()), *text_metrics(protocol))


def _reg(protocol: ProtocolName) -> tuple[Metric, ...]:
    return (*((NamesIt(),) if protocol == "standard" else ()), *text_metrics(protocol))


METRICS: Mapping[str, Callable[[ProtocolName], tuple[Metric, ...]]] = {
    "report": text_metrics,
    "vqa.closed": choice_metrics,
    "vqa.open": _open,
    "rec.box3d": box_metrics,
    "reg": _reg,
    "seg.sem": mask_metrics,
    "seg.ref": mask_metrics,
}


def metrics_of(task: str, protocol: ProtocolName) -> tuple[Metric, ...]:
    """The metrics of a task, the first of them its headline.

    Raises:
        KeyError: The task has none.
    """
    return lookup(METRICS, task)(protocol)
