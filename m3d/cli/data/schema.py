"""`m3d data schema`: the JSON Schema of ``m3d.record/1``, for other tools and languages."""

import argparse
import json

from m3d.cli.common import say

DESCRIPTION = "Print the JSON Schema of m3d.record/1. `m3d data verify` also checks what a schema cannot say."
EPILOG = """\
examples:
  m3d data schema
  m3d data schema > record.schema.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Nothing to add."""


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    from data_prep.record import Record

    say(json.dumps(Record.model_json_schema(by_alias=True), indent=1))
    return 0
