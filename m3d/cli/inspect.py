"""`m3d inspect FILE`: what a model will see of a scan, before asking it anything."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3d.cli.common import add_scan_options, check_out, console, note, read_scan, say_json, working

if TYPE_CHECKING:
    from collections.abc import Iterator

DESCRIPTION = (
    "Show what a model will see of a scan: geometry, intensities, window, crop, grid, warnings, and a picture."
)
EPILOG = """\
examples:
  m3d inspect ct.nii.gz                     facts, and out/inspect.png
  m3d inspect dicom_folder/ --out look
  m3d inspect array.npy --spacing 2.5,0.98,0.98 --json

Only the model's preprocess.json is read, so this is quick and needs no torch; --device changes nothing here.
"""
PICTURE, FACTS = "inspect.png", "inspect.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.set_defaults(out=Path("out"))
    add_scan_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Inspect."""
    from data_prep.preprocess import Preprocess
    from m3d.inference.checkpoints import resolve
    from m3d.inference.look_at import look_at
    from m3d.inference.results import PICTURE_BYTES, staged, write_json

    check_out(arguments, [PICTURE, FACTS])
    folder = resolve(arguments.model)
    preprocess = Preprocess.read(folder)
    volume = read_scan(arguments)
    with working("preparing it as the model would"):
        seen = look_at(volume, preprocess, model_id=folder.name, path=arguments.scan)
        facts = seen.to_dict()
        needed = 2 * PICTURE_BYTES
        with staged(arguments.out, [PICTURE, FACTS], force=arguments.force, needed=needed) as stage:
            seen.save_picture(stage / PICTURE)
            write_json(stage / FACTS, facts)
    if arguments.json:
        say_json({**facts, "saved": [str(arguments.out / name) for name in (PICTURE, FACTS)]})
        return 0
    _say_facts(facts)
    note(f"saved {arguments.out / PICTURE} and {FACTS} beside it. Not for clinical use.")
    return 0


def _say_facts(facts: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, value)
    console().print(table)


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    scan, model = facts["scan"], facts["model"]
    yield "scan", scan["file"]
    yield "shape", _times(scan["shape"], "d") + " voxels"
    yield "spacing", f"{_times(scan['spacing_mm'])} mm; in all {_times(scan['size_mm'])} mm"
    lean = ", oblique" if scan["oblique"] else ""
    yield "orientation", f"{scan['orientation']} (where each index grows to){lean}"
    yield "intensities", f"{scan['range'][0]:g} to {scan['range'][1]:g}"
    yield "", ""
    yield "model", model["id"]
    lo, hi = model["window"]
    clipped = f"{model['darker']:.1%} of voxels are darker, {model['brighter']:.1%} brighter"
    yield "window", f"{lo:g} to {hi:g} ({model['window_kind']}); {clipped}"
    yield "crop", f"voxels {_corner(model['crop']['lo'])} to {_corner(model['crop']['hi'])}"
    yield "grid", f"{_times(model['grid'], 'd')} of {_times(model['grid_spacing_mm'])} mm, {model['grid_orientation']}"
    for warning in facts["warnings"] or ["none"]:
        yield "warnings", warning


def _times(values: list[float], form: str = ".4g") -> str:
    return " x ".join(format(value, form) for value in values)


def _corner(values: list[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"
