"""`m3d data stats STORE`: how dense a store is, how long its texts are, which labels and answers it has."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from m3d.cli.common import check_out, console, note, printable, say, say_json, working
from m3d.cli.data.verify import positive

if TYPE_CHECKING:
    from data_prep.stats import Statistics

JSON, MARKDOWN, PICTURE = "stats.json", "stats.md", "stats.png"
DESCRIPTION = """\
Count what a store holds: images, patients and records by split, entries and tasks per image, lengths of texts, voxels
and millilitres of every structure, and how far one answer alone would get in each kind of question.
"""
EPILOG = """\
examples:
  m3d data stats stores/openkbp                      tables in the terminal
  m3d data stats stores/openkbp --out stats          also stats/stats.png, stats.md and stats.json
  m3d data stats records.jsonl --root /data/m3d --fast       records only, no masks are opened
  m3d data stats stores/openkbp --json

"most frequent" under Answers is what a model scores that never looks: report it beside an accuracy. Volumes are
those of the stored grid, coarser than the scan's own; structures of a few voxels are rough.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("source", type=Path, metavar="STORE", help="a store's folder, or a records.jsonl")
    parser.add_argument("--root", type=Path, metavar="DIR", help="where the paths of the media start (its own folder)")
    group = parser.add_argument_group("how")
    group.add_argument("--fast", action="store_true", help="open no mask: no voxels, no mL")
    group.add_argument("--workers", type=positive, metavar="N", help="processes (default: one a core)")


def run(arguments: argparse.Namespace) -> int:
    """Count, print, draw."""
    from data_prep.stats import gather_statistics

    check_out(arguments, [JSON, MARKDOWN, PICTURE])
    with working("counting"):
        found = gather_statistics(arguments.source, root=arguments.root, workers=arguments.workers, fast=arguments.fast)
    if arguments.out is not None:
        _write(found, arguments.out)
    if arguments.json:
        say_json(found.to_dict())
        return 0
    _print(found)
    if arguments.out is not None:
        note(f"saved {arguments.out / PICTURE}, {MARKDOWN} and {JSON} beside it")
    return 0


def _print(found: Statistics) -> None:
    """Tables for a person at a terminal, plain Markdown for a pipe."""
    text = printable(found.to_markdown())
    plain = console()
    if not plain.is_terminal:
        say(text)
        return
    from rich.markdown import Markdown

    plain.print(Markdown(text))


def _write(found: Statistics, folder: Path) -> None:
    import json

    from data_prep.atomic import atomic_path
    from m3d.cli.data.stats_figure import draw_statistics

    with atomic_path(folder / JSON) as temporary:
        temporary.write_text(json.dumps(found.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")
    with atomic_path(folder / MARKDOWN) as temporary:
        temporary.write_text(found.to_markdown(), encoding="utf-8")
    with atomic_path(folder / PICTURE) as temporary:
        draw_statistics(found, temporary)
