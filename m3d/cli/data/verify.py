"""`m3d data verify STORE`: everything that is wrong with the data, before training finds it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from m3d.cli.common import check_out, console, note, printable, say, say_json, shortened

if TYPE_CHECKING:
    from data_prep.record import Record
    from data_prep.verify.findings import Report
    from data_prep.verify.images import ImageResult

JSON, MARKDOWN = "verify.json", "verify.md"
EXAMPLES = 3
DESCRIPTION = """\
Read every line, every image and every mask of a store once, and list what is wrong with them. Prints a table by check,
and exits with 1 if there is an error, with 0 if there are only warnings. Nothing is changed.
"""
EPILOG = """\
what is checked:
{checks}

examples:
  m3d data verify stores/openkbp
  m3d data verify stores/openkbp --out report             also report/verify.md and report/verify.json
  m3d data verify records.jsonl --root /data/m3d          a file of records; its media lie under --root
  m3d data verify stores/m3d --fast                       files and headers, no voxels: minutes become seconds
  m3d data verify stores/m3d --allow reports              known twins of reports: these only warn from now on

A warning is worth a look; an error will teach or measure something wrong. Each finding ends with what helps.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    from data_prep.verify.findings import CHECKS

    parser.epilog = EPILOG.format(checks="\n".join(f"  {name:<10} {meaning}" for name, meaning in CHECKS.items()))
    parser.add_argument("source", type=Path, metavar="STORE", help="a store's folder, or a records.jsonl")
    parser.add_argument("--root", type=Path, metavar="DIR", help="where the paths of the media start (its own folder)")
    group = parser.add_argument_group("how")
    group.add_argument("--fast", action="store_true", help="open no voxels: no values, empty masks, boxes, copies")
    group.add_argument("--workers", type=positive, metavar="N", help="processes (default: one a core)")
    group.add_argument(
        "--limit", type=positive, default=100, metavar="N", help="findings kept of each check; all are counted"
    )
    group.add_argument("--similar", type=fraction, default=0.8, metavar="J", help="reports this alike are twins (0.8)")
    group.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=list(CHECKS),
        metavar="CHECK",
        help="count this check's errors as warnings; may be given several times",
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify; 1 if there is an error."""
    from data_prep.verify.run import Settings, verify

    check_out(arguments, [JSON, MARKDOWN])
    settings = Settings(
        limit=arguments.limit,
        workers=arguments.workers,
        fast=arguments.fast,
        similar=arguments.similar,
        allow=tuple(arguments.allow),
    )
    report = verify(arguments.source, root=arguments.root, settings=settings, render=try_to_render, progress=_progress)
    if arguments.out is not None:
        _write(report, arguments.out)
    if arguments.json:
        say_json(report.to_dict())
    else:
        _print(report)
        if arguments.out is not None:
            note(f"saved {arguments.out / MARKDOWN} and {JSON} beside it")
    return 0 if report.ok else 1


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def fraction(text: str) -> float:
    """An argparse type: above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie between 0 and 1")
    return value


def try_to_render(record: Record) -> str | None:
    """What keeps a record's prompt and answer from being written, None where nothing does."""
    from m3d.tasks import TASKS, render
    from m3d.tasks.codecs import Frac3

    try:
        render(TASKS, record, codec=Frac3())
    except (ValueError, OSError) as error:
        return str(error).removeprefix(f"record {record.id}: ")
    except KeyError as error:
        return str(error.args[0]) if error.args else repr(error)
    return None


def _progress(items: Iterable[ImageResult], *, total: int, what: str) -> Iterable[ImageResult]:
    from tqdm import tqdm

    return tqdm(items, total=total, unit=what.removesuffix("s"), desc="verifying", disable=None, leave=False)


def _write(report: Report, folder: Path) -> None:
    import json

    from data_prep.atomic import atomic_path

    with atomic_path(folder / JSON) as temporary:
        temporary.write_text(json.dumps(report.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")
    with atomic_path(folder / MARKDOWN) as temporary:
        temporary.write_text(report.to_markdown(), encoding="utf-8")


def _print(report: Report) -> None:
    from rich.markup import escape
    from rich.table import Table

    from data_prep.verify.findings import CHECKS

    table = Table("check", "errors", "warnings", "first findings", show_lines=True)
    fine = []
    for check in CHECKS:
        errors, warnings = report.count("error", check), report.count("warning", check)
        if not errors + warnings:
            fine.append(f"{check} (not looked at: {report.skipped[check]})" if check in report.skipped else check)
            continue
        found = [shortened(str(one), 400) for one in report.of(check)[:EXAMPLES]]
        more = [f"... and {errors + warnings - EXAMPLES} more"] if errors + warnings > EXAMPLES else []
        colours = [f"[red]{errors}[/]" if errors else "", f"[yellow]{warnings}[/]" if warnings else ""]
        table.add_row(check, *colours, escape("\n".join([*found, *more])))
    if table.row_count:
        console().print(table)
    say(f"nothing wrong: {', '.join(fine)}")
    say(printable(report.summary))
