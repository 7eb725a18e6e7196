"""`m3d report SCAN`: the scan's report."""

import argparse

from m3d.cli.common import add_scan_options, deliver, open_scan

DESCRIPTION = "Write the report of a scan. With --out, also result.json."
EPILOG = """\
examples:
  m3d report ct.nii.gz
  m3d report dicom_folder/ --series 1.2.840.113619.2.55 --out out
  m3d report array.npy --spacing 2.5,0.98,0.98 --json

The bundled model's words are derived from masks it learned, not from radiologists' reports. Not for clinical use.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    add_scan_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Report."""
    return deliver(arguments, open_scan(arguments).report())
