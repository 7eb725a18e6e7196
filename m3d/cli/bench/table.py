"""`m3d bench table DIR...`: the numbers of scored runs beside each other and beside what papers state."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from m3d.cli.common import check_out, console, note, say, say_json

MARKDOWN = "table.md"
DESCRIPTION = """\
Print the metrics of one or more scored runs: each value with its 95 % interval over patients, the blind twin and the
gain over it, chance, how many samples and how many failed, what `m3d bench judge` found, and published numbers of the
same task and metric.
"""
EPILOG = """\
examples:
  m3d bench table bench/tiny                         one run
  m3d bench table bench/tiny bench/smol --groups     two, also by structure and kind of question
  m3d bench table bench/tiny --protocol both         as it is, and as the released evaluation would have it
  m3d bench table bench/tiny --markdown > table.md
  m3d bench table bench/tiny bench/smol --out report     also report/table.md
  m3d bench table bench/tiny --json

Published numbers are marked with their protocol and data. Unless a run is of M3D-Bench's own data, they are of other
data, and nothing follows from a difference. Two runs of the same records: `m3d bench compare A B`.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="a run that was scored")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--protocol", choices=("standard", "m3d", "both"), default="standard", help="scored by (standard)"
    )
    group.add_argument("--groups", action="store_true", help="also by structure or kind of question")
    group.add_argument("--markdown", action="store_true", help="Markdown on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Read, print, write."""
    from data_prep.atomic import atomic_path
    from m3d.bench.table import markdown, sheet, terminal

    check_out(arguments, [MARKDOWN])
    protocols = ("standard", "m3d") if arguments.protocol == "both" else (arguments.protocol,)
    runs = [_read(folder, protocol) for folder in arguments.folders for protocol in protocols]
    if arguments.out is not None:
        with atomic_path(arguments.out / MARKDOWN) as temporary:
            temporary.write_text(markdown(runs, groups=arguments.groups), encoding="utf-8")
    if arguments.json:
        say_json(sheet(runs, groups=arguments.groups).to_dict())
    elif arguments.markdown:
        say(markdown(runs, groups=arguments.groups).rstrip())
    else:
        console().print(terminal(runs, groups=arguments.groups))
    if arguments.out is not None:
        note(f"saved {arguments.out / MARKDOWN}")
    return 0


def _read(folder: Path, protocol: str) -> dict[str, Any]:
    """A scored run, and what a judge made of it."""
    from m3d.bench.judge_summary import with_judge
    from m3d.bench.scored import read_metrics

    run = read_metrics(folder, protocol)
    return with_judge(folder, run) if protocol == "standard" else run
