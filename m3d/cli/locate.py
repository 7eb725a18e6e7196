"""`m3d locate SCAN NAME`: a structure's box."""

import argparse

from m3d.cli.common import add_scan_options, deliver, note, open_scan

DESCRIPTION = "Find a structure: its box in the scan's voxels and in patient mm. With --out, also a picture and JSON."
EPILOG = """\
examples:
  m3d locate ct.nii.gz mandible
  m3d locate ct.nii.gz "left parotid" --out out
  m3d locate ct.nii.gz larynx --json

A voxel box is half-open, (lo, hi) along the scan's stored axes as `m3d inspect` prints them; mm are patient
coordinates that grow to right, anterior and superior (RAS).
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    add_scan_options(parser)
    parser.add_argument("name", metavar="NAME", help='a structure, such as mandible or "left parotid"')


def run(arguments: argparse.Namespace) -> int:
    """Locate."""
    if not arguments.name.strip():
        raise ValueError("the name is empty; name a structure, such as mandible")
    result = open_scan(arguments).locate(arguments.name)
    if not result.boxes:
        note(f"no box of {arguments.name!r}: the model named none")
    return deliver(arguments, result)
