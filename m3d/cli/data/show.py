"""`m3d data show STORE`: a rendered sample of each task with its picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from m3d.cli.common import check_out, note, printable, say, say_json, working

if TYPE_CHECKING:
    from m3d.inference.sample_sheet import Sample

SHEET = "samples.png"
DESCRIPTION = """\
Show one record of each task as training will see it: the stored image in three planes with boxes and masks, and the
prompt and answer that the task writes. One PNG a task, all of them on one sheet, and the words in the terminal.
"""
EPILOG = """\
examples:
  m3d data show stores/openkbp                                 samples/samples.png and one PNG a task
  m3d data show stores/openkbp --seed 7 --out look             others
  m3d data show stores/openkbp --task seg.ref --task reg
  m3d data show stores/openkbp --image openkbp/pt_201 --json

Prompts and answers are in the fixed wording of evaluation; training draws among all variants.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.set_defaults(out=Path("samples"))
    parser.add_argument("store", type=Path, metavar="STORE", help="a store's folder")
    group = parser.add_argument_group("which")
    group.add_argument("--image", metavar="ID", help="only this image, such as openkbp/pt_201")
    group.add_argument("--task", action="append", metavar="TASK", help="only this task; may be given several times")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="another number, other samples (0)")


def run(arguments: argparse.Namespace) -> int:
    """Choose, draw, say."""
    from data_prep.store import Store
    from m3d.inference.sample_sheet import choose_samples

    store = Store(arguments.store)
    with working("reading the records"):
        samples = choose_samples(store, tasks=arguments.task, image_id=arguments.image, seed=arguments.seed)
    pictures = [f"{sample.record.task}.png" for sample in samples]
    check_out(arguments, [SHEET, *pictures])
    with working("drawing"):
        _draw(samples, arguments.out)
    if arguments.json:
        saved = [str(arguments.out / name) for name in (SHEET, *pictures)]
        say_json({"store": str(arguments.store), "samples": [one.to_dict() for one in samples], "saved": saved})
        return 0
    for sample in samples:
        say(printable(f"{sample.record.task}   {sample.record.id}"))
        for label, text in sample.words:
            say(printable(f"  {label}: {text}"))
    note(f"saved {arguments.out / SHEET} and one picture a task beside it. Not for clinical use.")
    return 0


def _draw(samples: list[Sample], folder: Path) -> None:
    from data_prep.atomic import atomic_path
    from m3d.inference.overlay import save_png
    from m3d.inference.sample_sheet import contact_sheet, draw_sample

    figures = []
    for sample in samples:
        figures.append(draw_sample(sample))
        with atomic_path(folder / f"{sample.record.task}.png") as temporary:
            save_png(figures[-1], temporary)
    with atomic_path(folder / SHEET) as temporary:
        contact_sheet(figures).save(temporary, format="PNG")
