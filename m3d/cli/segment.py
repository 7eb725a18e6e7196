"""`m3d segment SCAN NAME ...`: the voxels of one structure or several, on the scan's own grid."""

from __future__ import annotations

import argparse
from pathlib import Path

from m3d.cli.common import add_scan_options, check_out, deliver, note, numbers, open_scan

DESCRIPTION = "Draw structures by name, or one by points, a box, or all; masks have the scan's own shape and affine."
EPILOG = """\
examples:
  m3d segment ct.nii.gz mandible
  m3d segment ct.nii.gz "spinal cord" --out cord
  m3d segment ct.nii.gz --point 40,61,64 --point 40,80,64,-       inside the first, outside the second
  m3d segment ct.nii.gz mandible --box 20,30,35,60,70,95
  m3d segment ct.nii.gz --point -12.5,40,103 --frame mm
  m3d segment ct.nii.gz mandible brainstem --labels               both in one label map
  m3d segment ct.nii.gz --all --out structures                    all that the model has learned
  m3d segment ct.nii.gz mandible --zoom native                    again from closer, at the scan's own resolution
  m3d segment ct.nii.gz mandible --largest-component --fill-holes --min-volume 0.5

--frame voxel (the default) counts from 0 along the scan's stored axes, as `m3d inspect` prints them; a box ends before
its upper corner. --frame mm is patient coordinates: right, anterior, superior (RAS).

Writes NAME.nii.gz, NAME.png and result.json, which has each mask's volume, extents, mean and longest diameter, and what
was done to it. With --labels also label-map.nii.gz, with names and colours for ITK-SNAP (.txt), 3D Slicer (.ctbl) and
programs (.json), and a picture of all (.png). Its labels are numbered in the order of the names, with --all in that of
the model's vocabulary; a structure that is not drawn keeps its number, so that a label means the same for every scan.

One name that the model refuses to draw is an error; of several, those are reported as not drawn.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.set_defaults(out=Path("out"), usage_error=parser.error)
    add_scan_options(parser)
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="a structure, or several; may be left out with --point, --box or --all"
    )
    parser.add_argument("--all", action="store_true", help="all structures that the model has learned; with --labels")
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
    group.add_argument(
        "--zoom",
        nargs="?",
        type=_zoom,
        const=True,
        default=False,
        metavar="FACTOR",
        help="draw again from closer: FACTOR times finer than the model's grid, or 'native', the scan's own voxels, "
        "which is also meant without FACTOR; then put it last",
    )
    group = parser.add_argument_group("after drawing")
    group.add_argument("--fill-holes", action="store_true", help="fill what a mask encloses in 3D")
    group.add_argument(
        "--min-volume", type=float, metavar="ML", default=0.0, help="remove components of a mask that are smaller"
    )
    group.add_argument("--largest-component", action="store_true", help="keep only the largest component of a mask")
    group.add_argument("--labels", action="store_true", help="also write the masks as one label map, with tables")
    group.add_argument(
        "--overlaps",
        choices=("smaller", "last", "keep"),
        default="smaller",
        help="in the label map, what several masks share goes to the smaller structure (the default), to the last, or "
        "to all of them, in several maps",
    )
    group.add_argument(
        "--doubtful", action="store_true", help="also paint what is probably not in the scan (present below 0.5)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Segment."""
    from data_prep.boxes import Box
    from m3d.inference.label_map import label_map_files, write_label_map
    from m3d.inference.postprocess import PostProcess

    names = [name for name in arguments.names if name]
    prompted = bool(arguments.points or arguments.box)
    if arguments.all and (names or prompted):
        arguments.usage_error("--all draws all that the model has learned; leave out names, --point and --box")
    if not (names or prompted or arguments.all):
        arguments.usage_error("say what to segment: a NAME, --all, --point or --box")
    if len(names) > 1 and prompted:
        arguments.usage_error(f"--point and --box are about one structure, and {len(names)} are named")
    cleaning = PostProcess(
        largest_component=arguments.largest_component,
        fill_holes=arguments.fill_holes,
        min_volume_ml=arguments.min_volume,
    )
    box = None if arguments.box is None else Box(arguments.box[:3], arguments.box[3:], arguments.frame)
    labels = arguments.labels or arguments.all
    check_out(arguments, label_map_files() if labels else [])
    scan = open_scan(arguments)
    if arguments.all:
        result = scan.segment_all(postprocess=cleaning, zoom=arguments.zoom)
    else:
        what = names if len(names) > 1 else names[0] if names else None
        result = scan.segment(
            what,
            points=arguments.points or None,
            box=box,
            frame=arguments.frame,
            postprocess=cleaning,
            zoom=arguments.zoom,
        )
    code = deliver(arguments, result)
    if labels:
        written = write_label_map(
            arguments.out, result, overlaps=arguments.overlaps, doubtful=arguments.doubtful, force=arguments.force
        )
        for path in written:
            note(f"saved {path}")
    return code


def _zoom(text: str) -> bool | float:
    """``2.5`` or ``native``."""
    from m3d.inference.zooming import zoom_factor

    try:
        zoom_factor("native" if text == "native" else float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number above 1, nor 'native'; a NAME stands before --zoom, or write --zoom=native"
        ) from None
    return True if text == "native" else float(text)


def _point(text: str) -> tuple[tuple[float, ...], int]:
    """``40,61,64,-`` to its place and label: 1 inside, 0 outside."""
    place, _, sign = text.rpartition(",")
    if sign in ("+", "-"):
        return numbers(3)(place), int(sign == "+")
    return numbers(3)(text), 1
