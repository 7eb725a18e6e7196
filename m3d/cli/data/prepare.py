"""`m3d data prepare CONFIG`: sources in, a store out; run it again to continue."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3d.cli.common import console, note, say, say_json
from m3d.config import load_config

if TYPE_CHECKING:
    from data_prep.prepare import Summary
    from data_prep.prepare.one import Outcome
    from data_prep.prepare.runners import Runner
    from data_prep.sources.base import Entry

DESCRIPTION = """\
Read every scan of the config's sources once, put it on the model's grid, and write a store: small volumes, label maps,
records of every task, and the way back to each scan. Stopped or killed, it goes on where it was. What cannot be
prepared is listed with its file and the reason in rejects.jsonl, and never replaced by another scan.
"""
EPILOG = """\
A config (see configs/data/):
  root: /data                     where relative roots of sources begin
  output: stores/mine             the store, or --out
  preprocess: {grid: [64, 64, 96], spacing: [5.0, 4.2, 5.0], intensity: {kind: window, lo: -200, hi: 400}}
  kept: uint8                     how [0, 1] is stored: uint8, uint16 or float32
  derive: [report, vqa, rec, reg, seg, retrieval]      truths derived from masks and header; [] for none
  sources:
    - {kind: openkbp, root: openkbp}
    - {kind: folder, root: mine, scans: "*.nii.gz", derive: [rec, seg]}      a source may have its own derive

examples:
  m3d data prepare configs/data/openkbp.yaml root=/data/openkbp --out stores/openkbp --workers 8
  m3d data prepare configs/data/phantoms.yaml "sources.0.seeds.train=[0,20]" --out stores/phantoms
  m3d data prepare mine.yaml --limit 5              a first look at five scans
  m3d data prepare mine.yaml --ray auto             on the Ray cluster that this machine belongs to
  m3d data prepare mine.yaml --ray local            on a Ray of its own, here

Then: m3d data verify STORE; m3d data stats STORE; m3d data show STORE.
"""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which sources become which store, and how; see ``m3d data prepare --help``."""

    sources: list[dict[str, Any]]
    preprocess: dict[str, Any]
    output: str | None = None
    root: str = "."
    kept: str = "uint8"
    derive: list[str] = dataclasses.field(default_factory=lambda: ["report", "vqa", "rec", "reg", "seg", "retrieval"])
    seed: int = 0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML: sources, preprocess, output")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the config's")
    group = parser.add_argument_group("work")
    group.add_argument(
        "--workers", type=count(0), metavar="N", help="processes (default: one a core; 0 works in this one)"
    )
    group.add_argument("--ray", metavar="ADDRESS", help='"local", "auto", or a cluster\'s address (extra [scale])')
    group.add_argument("--limit", type=count(1), metavar="N", help="only the first N images of each source")
    group.add_argument("--list", action="store_true", help="only list what the sources hold")


def count(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from ``least`` on."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least}")
        return int(text)

    return read


def run(arguments: argparse.Namespace) -> int:
    """Prepare; 1 if anything was rejected."""
    from data_prep.prepare import Job, prepare
    from data_prep.preprocess import Preprocess

    config = load_config(PrepareConfig, arguments.config, arguments.overrides)
    output = arguments.out or (Path(config.output) if config.output else None)
    if output is None and not arguments.list:
        raise ValueError(f"{arguments.config} has no output; add one, or --out DIR")
    try:
        preprocess = Preprocess.from_dict(config.preprocess)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{arguments.config}: preprocess: {error}") from None
    entries = _entries(config, arguments.limit)
    if arguments.list:
        return _list(entries, arguments)
    assert output is not None
    if arguments.limit is not None:
        _check_first_look(output, len(entries))
    job = Job(preprocess=preprocess, kept=config.kept, derive=tuple(config.derive), seed=config.seed)  # type: ignore[arg-type]  # Job checks it
    summary = prepare(entries, job, output, runner=_runner(arguments), progress=_progress)
    _report(summary, output, arguments.json)
    return 1 if summary.rejected else 0


def _entries(config: PrepareConfig, limit: int | None) -> list[Entry]:
    import itertools

    from data_prep.prepare.job import check_kinds
    from data_prep.sources.registry import build_source

    if not config.sources:
        raise ValueError("the config has no sources; `m3d data prepare --help` shows some")
    found: list[Entry] = []
    for fields in config.sources:
        source = build_source({key: value for key, value in fields.items() if key != "derive"}, root=Path(config.root))
        listed = list(itertools.islice(source.entries(), limit))
        if not listed:
            raise ValueError(f"source {source.name} lists no image; is its root right?")
        own = check_kinds(fields["derive"]) if "derive" in fields else None
        found += [dataclasses.replace(entry, derive=own) for entry in listed]
    return found


def _check_first_look(output: Path, listed: int) -> None:
    """A store of more images would lose most of them from its indexes."""
    there = sum(1 for _ in (output / "parts").rglob("*.json"))
    if there > listed:
        raise ValueError(
            f"{output} holds {there} images, --limit lists {listed}; choose another --out for a first look"
        )


def _runner(arguments: argparse.Namespace) -> Runner:
    import os

    from data_prep.prepare import Local, RayCluster

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if arguments.workers is None else arguments.workers
    if arguments.ray is None:
        return Local(workers)
    return RayCluster(None if arguments.ray == "local" else arguments.ray, max(workers, 1))


def _progress(todo: Sequence[Entry], outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    from tqdm import tqdm

    rejected = 0
    with tqdm(total=len(todo), unit="scan", desc="preparing", disable=not todo) as bar:
        for outcome in outcomes:
            if outcome.error is not None:
                rejected += 1
                bar.set_postfix(rejected=rejected)
            bar.update()
            yield outcome


def _list(entries: Sequence[Entry], arguments: argparse.Namespace) -> int:
    from collections import Counter

    counts = Counter((entry.dataset, entry.split) for entry in entries)
    patients = Counter(key for key, _ in {((e.dataset, e.split), e.patient_id) for e in entries})
    rows = [
        {"dataset": dataset, "split": split, "images": number, "patients": patients[dataset, split]}
        for (dataset, split), number in sorted(counts.items())
    ]
    if arguments.json:
        say_json({"sources": rows})
        return 0
    from rich.table import Table

    table = Table("data set", "split", "images", "patients")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console().print(table)
    return 0


def _report(summary: Summary, output: Path, as_json: bool) -> None:
    if as_json:
        say_json({"store": str(output), **vars(summary), "tasks": dict(summary.tasks)})
        return
    say(
        f"{summary.images} images in {output}: {summary.prepared} prepared now, {summary.found} were there, "
        f"{summary.rejected} rejected; {summary.seconds:.1f} s"
    )
    say(", ".join(f"{count} {task}" for task, count in sorted(summary.tasks.items())) or "no records")
    if summary.rejected or summary.dropped:
        note(f"{summary.rejected} scans and {summary.dropped} records left out, with reasons: {output}/rejects.jsonl")
    if summary.warned:
        note(f"{summary.warned} images have warnings, such as coarser voxels to fit the grid: {output}/images.jsonl")
    if summary.stale:
        note(f"{summary.stale} images of an earlier run are no longer listed by the sources; their files lie unused")
    say(f"next: m3d data verify {output}")
