"""`m3d data pseudo STORE`: regions that grey values alone set apart, for the mask head to learn from."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from m3d.cli.common import say, say_json

if TYPE_CHECKING:
    from data_prep.store import StoredImage

DESCRIPTION = """\
Find pseudo-masks in every image of a store, by the graph-based segmentation of Felzenszwalb and Huttenlocher in 3D.
They have no names: pretrain_segvol asks for them by points and boxes alone (SegVol, arXiv 2311.13385), also in scans
that nobody has contoured. Stopped or killed, it goes on where it was.
"""
EPILOG = """\
examples:
  m3d data pseudo stores/mine
  m3d data pseudo stores/mine --scale 1 --sigma 0.8            fewer, larger regions of smoother images
  m3d train configs/lamed/pretrain_segvol.yaml data.stores=[stores/mine] data.pseudo=0.3

Writes STORE/pseudo/; the store itself stays as it is.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("store", type=Path, metavar="STORE", help="a store of `m3d data prepare`")
    group = parser.add_argument_group("regions")
    group.add_argument("--scale", type=float, default=0.3, metavar="K", help="larger regions the larger it is (0.3)")
    group.add_argument("--sigma", type=float, default=0.0, metavar="VOXELS", help="smoothing beforehand (0: none)")
    group.add_argument(
        "--smallest", type=float, default=0.0003, metavar="SHARE", help="of the grid; smaller ones join others (0.0003)"
    )
    group.add_argument(
        "--largest", type=float, default=0.3, metavar="SHARE", help="of what is no air; larger ones are none (0.3)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Find them."""
    from tqdm import tqdm

    from data_prep.pseudo import PseudoMasks
    from data_prep.pseudo_store import write_pseudo
    from data_prep.store import Store

    def progress(todo: list[StoredImage]) -> Iterable[StoredImage]:
        return tqdm(todo, unit="scan", desc="finding regions", disable=not todo)

    how = PseudoMasks(
        scale=arguments.scale, sigma=arguments.sigma, smallest=arguments.smallest, largest=arguments.largest
    )
    found = write_pseudo(Store(arguments.store), how, force=arguments.force, progress=progress)
    if arguments.json:
        say_json({"store": str(arguments.store), **vars(found), **how.to_dict()})
        return 0
    new = found.images - found.there
    say(f"{new} images now, {found.there} were there; {found.regions / max(new, 1):.0f} regions an image")
    return 0
