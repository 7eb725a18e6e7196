"""`m3d bench compare A B`: which of two runs is better, in what, and how sure that is."""

from __future__ import annotations

import argparse
from pathlib import Path

from m3d.cli.common import check_out, console, note, say, say_json, working

MARKDOWN, JSON = "compare.md", "compare.json"
DESCRIPTION = """\
Compare two scored runs on the samples that both have: for each task and metric the value of each, their difference with
its 95 % interval over patients, and how likely so large a difference is of runs that are alike.
"""
EPILOG = """\
examples:
  m3d bench compare bench/tiny bench/smol
  m3d bench compare bench/tiny bench/smol --markdown
  m3d bench compare bench/tiny bench/smol --out report     also report/compare.md and compare.json

A difference is A less B. p is of a permutation test that exchanges the runs of whole patients; "p (Holm)" is corrected
for the number of tests, and * marks what holds at 5 % after that. The records that both answered are compared; runs
that share none, or that were scored with another protocol, grid or variant of a metric, are refused.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("one", type=Path, metavar="A", help="a run that was scored")
    parser.add_argument("other", type=Path, metavar="B", help="another, of the same records")
    group = parser.add_argument_group("how")
    group.add_argument("--protocol", choices=("standard", "m3d"), default="standard", help="scored by (standard)")
    group.add_argument("--markdown", action="store_true", help="Markdown on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, write."""
    from data_prep.atomic import atomic_path
    from m3d.bench.compare import compare
    from m3d.inference.results import write_json

    check_out(arguments, [MARKDOWN, JSON])
    with working("comparing"):
        found = compare(arguments.one, arguments.other, protocol=arguments.protocol)
    if arguments.out is not None:
        with atomic_path(arguments.out / JSON) as temporary:
            write_json(temporary, found.to_dict())
        with atomic_path(arguments.out / MARKDOWN) as temporary:
            temporary.write_text(found.markdown(), encoding="utf-8")
    if arguments.json:
        say_json(found.to_dict())
    elif arguments.markdown:
        say(found.markdown().rstrip())
    else:
        console().print(found.terminal())
    if arguments.out is not None:
        note(f"saved {arguments.out / MARKDOWN} and {JSON} beside it")
    return 0
