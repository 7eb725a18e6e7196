"""`m3d segment SCAN NAME`: a structure's voxels, on the scan's own grid."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from m3d.cli.common import add_scan_options, deliver, numbers, open_scan

if TYPE_CHECKING:
    from data_prep.boxes import Box
    from data_prep.volume import Volume

DESCRIPTION = "Draw a structure by name, points, a box, or together; the mask has the scan's own shape and affine."
EPILOG = """\
examples:
  m3d segment ct.nii.gz mandible
  m3d segment ct.nii.gz "spinal cord" --out cord
  m3d segment ct.nii.gz --point 40,61,64 --point 40,80,64,-       inside the first, outside the second
  m3d segment ct.nii.gz mandible --box 20,30,35,60,70,95
  m3d segment ct.nii.gz --point -12.5,40,103 --frame mm

--frame voxel (the default) counts from 0 along the scan's stored axes, as `m3d inspect` prints them; a box ends before
its upper corner. --frame mm is patient coordinates: right, anterior, superior (RAS).

Writes NAME.nii.gz, NAME.png and result.json.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.set_defaults(out=Path("out"), usage_error=parser.error)
    add_scan_options(parser)
    parser.add_argument("name", metavar="NAME", nargs="?", help="a structure; may be left out with --point or --box")
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--point",
        dest="points",
        action="append",
        default=[],
        type=_point,
        metavar="Z,Y,X[,+|-]",
        help="inside (+, the default) or outside (-) the structure; repeat for more",
    )
    group.add_argument("--box", type=numbers(6), metavar="Z0,Y0,X0,Z1,Y1,X1", help="around the structure")
    group.add_argument("--frame", choices=("voxel", "mm"), default="voxel", help="what points and box are given in")


def run(arguments: argparse.Namespace) -> int:
    """Segment."""
    if not (arguments.name or arguments.points or arguments.box):
        arguments.usage_error("say what to segment: a NAME, --point or --box")
    scan = open_scan(arguments)
    points = [(_voxel(at, scan.volume, arguments.frame), label) for at, label in arguments.points]
    box = None if arguments.box is None else _voxel_box(arguments.box, scan.volume, arguments.frame)
    result = scan.segment(arguments.name or None, points=points or None, box=box)
    return deliver(arguments, result)


def _point(text: str) -> tuple[tuple[float, ...], int]:
    """``40,61,64,-`` to its place and label: 1 inside, 0 outside."""
    place, _, sign = text.rpartition(",")
    if sign in ("+", "-"):
        return numbers(3)(place), int(sign == "+")
    return numbers(3)(text), 1


def _voxel(at: tuple[float, float, float], volume: Volume, frame: str) -> tuple[float, float, float]:
    """A point as a voxel index of the scan, checked to lie in it."""
    d, h, w = volume.to_voxel([at])[0].tolist() if frame == "mm" else at
    if not all(-0.5 <= index <= side - 0.5 for index, side in zip((d, h, w), volume.shape, strict=True)):
        given = f"--point {','.join(f'{x:g}' for x in at)}"
        where = f"{frame} (voxel {d:.1f}, {h:.1f}, {w:.1f})" if frame == "mm" else frame
        raise ValueError(f"{given} in {where} lies outside the scan, whose shape is {volume.shape}")
    return d, h, w


def _voxel_box(corners: tuple[float, ...], volume: Volume, frame: str) -> Box:
    """A box in voxel edges, checked to have an inside and to lie in the scan; from mm it is clipped to it."""
    from data_prep.boxes import Box, to_voxel

    given = f"--box {','.join(f'{x:g}' for x in corners)}"
    if not all(low < high for low, high in zip(corners[:3], corners[3:], strict=True)):
        raise ValueError(f"{given} is empty: the first three numbers must be below the last three")
    if frame == "mm":
        box = to_voxel(Box(corners[:3], corners[3:], "mm"), volume.shape, volume.affine).clip(volume.shape)
    else:
        box = Box(corners[:3], corners[3:])
    if box.clip(volume.shape) != box or not all(side > 0 for side in box.sides):
        raise ValueError(f"{given} in {frame} reaches outside the scan, whose shape is {volume.shape}")
    return box
