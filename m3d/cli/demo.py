"""`m3d demo`: report, answer, box and masks of one scan, in files, pictures and a table."""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3d.cli.common import add_scan_options, check_out, console, look, note, printable, say_json, shortened, working
from m3d.cli.demo_scan import Chosen, choose

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from data_prep.case import Case
    from m3d.inference.results import Result
    from m3d.inference.scan import Scan

DESCRIPTION = """\
Report, answer, box and two masks of one scan, written as JSON, NIfTI and pictures, with a table of it all.
The scan is the one named; else a case under $M3D_DATA; else one public OpenKBP case, downloaded once and cached;
else a phantom, made on the spot. The output says which, and why."""
EPILOG = """\
examples:
  m3d demo
  m3d demo ct.nii.gz --out out --force
  m3d demo --phantom 7
  M3D_DATA=~/openkbp m3d demo --json

Where the scan has contours (structures.nii.gz beside ct.nii.gz, or a phantom) masks get a Dice and the box an IoU,
in the scan's own voxels. Not for clinical use.
"""
FACTS, OVERVIEW, PHANTOM = "demo.json", "overview.png", "phantom.nii.gz"
COLUMNS = {"asked for": "bold", "the model says": "", "the labels say": "dim", "score": "", "files": "dim"}
QUESTION = "Which parotid is larger?"
DRAWN = ("mandible", "spinal cord", "brainstem", "left parotid", "right parotid", "larynx", "esophagus")
BOXED = ("brainstem", "left parotid", "right parotid", "larynx", "mandible")
ASKED = ("larger", "volume", "length")


@dataclass(frozen=True, eq=False)
class Step:
    """One thing asked of the scan: its folder, what it was, and what came of it (``problem`` if nothing did)."""

    folder: str
    what: str
    result: Result | None
    problem: str = ""
    truth: str = ""
    score: float | None = None
    score_name: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.set_defaults(out=Path("out"), usage_error=parser.error)
    add_scan_options(parser, optional=True)
    parser.add_argument("--phantom", type=int, metavar="SEED", help="take the phantom of this seed, without a download")


def run(arguments: argparse.Namespace) -> int:
    """Choose a scan, ask it everything, save and say it."""
    from m3d.inference.checkpoints import resolve

    if arguments.scan is not None and arguments.phantom is not None:
        arguments.usage_error("give a SCAN or --phantom, not both")
    began = time.monotonic()
    check_out(arguments, [FACTS, OVERVIEW])
    resolve(arguments.model)
    chosen = choose(arguments.scan, phantom=arguments.phantom, series=arguments.series, spacing=arguments.spacing)
    note(f"scan: {'; '.join(chosen.reasons)}")
    plan = _Plan.of(chosen.case)
    check_out(arguments, [*(f"{folder}/result.json" for folder in plan.folders), *_phantom_file(chosen)])
    path = arguments.out / PHANTOM if chosen.kind == "phantom" else chosen.path
    scan = look(arguments, chosen.volume, path)
    steps = []
    for step in _ask(scan, plan, chosen.case):
        steps.append(step)
        note(f"{step.what}: {f'{step.result.seconds:.1f} s' if step.result is not None else 'nothing drawn'}")
    with working("writing masks and pictures"):
        for step in steps:
            if step.result is not None:
                step.result.save(arguments.out / step.folder, force=arguments.force)
        facts = _facts(scan, chosen, steps) | {"seconds": round(time.monotonic() - began, 1)}
        files = _save_whole(arguments, chosen, steps, facts)
    if arguments.json:
        say_json(facts)
    else:
        _say_table(scan, chosen, steps, facts, files)
    return 0


@dataclass(frozen=True)
class _Plan:
    """What to ask: what the labels know, so that answers can be judged; the usual where there are none."""

    question: str
    truth: str
    boxed: str
    drawn: tuple[str, str]

    @classmethod
    def of(cls, case: Case | None) -> _Plan:
        if case is None:
            return cls(QUESTION, "", BOXED[0], (DRAWN[0], DRAWN[1]))
        there = [name for name in DRAWN if name in case.names.values() and case.mask(name).any()]
        whole = sorted(there, key=lambda name: name in case.cut_by_crop)  # those that the scan cuts come last
        first, second, *_ = [*whole, *(name for name in DRAWN if name not in there)]
        boxed = next((name for name in BOXED if name in there and name not in case.cut_by_crop), BOXED[0])
        return cls(*_known_question(case), boxed, (first, second))

    @property
    def folders(self) -> tuple[str, ...]:
        """One for each result."""
        from m3d.inference.results import slug

        return "report", "answer", "box", *(f"mask_{slug(name)}" for name in self.drawn)


def _known_question(case: Case) -> tuple[str, str]:
    """A question whose answer the labels give, and that answer."""
    from data_prep.derived import derived_drafts

    drafts = [draft for draft in derived_drafts(case, random.Random(0), kinds=("vqa",)) if draft.task == "vqa.open"]
    for subtask in ASKED:
        for draft in drafts:
            if draft.subtask == subtask:
                return str(draft.slots["question"]), str(draft.text)
    return QUESTION, ""


def _ask(scan: Scan, plan: _Plan, case: Case | None) -> Iterator[Step]:
    report, answer, box, *masks = plan.folders
    with working("writing the report"):
        yield Step(report, "report", scan.report())
    with working("answering a question"):
        yield Step(answer, plan.question, scan.ask(plan.question), truth=plan.truth)
    with working(f"locating the {plan.boxed}"):
        yield _located(scan, plan.boxed, box, case)
    for name, folder in zip(plan.drawn, masks, strict=True):
        with working(f"drawing the {name}"):
            yield _drawn(scan, name, folder, case)


def _located(scan: Scan, name: str, folder: str, case: Case | None) -> Step:
    from data_prep.boxes import box_of_mask, iou

    result = scan.locate(name)
    truth = _truth(case, name)
    step = Step(folder, f"box of the {name}", result)
    if not result.boxes:
        step = dataclasses.replace(step, problem="the model named no box")
    if truth is None or not truth.any():
        return step
    overlap = iou(result.boxes[0].voxel, box_of_mask(truth)) if result.boxes else 0.0
    return dataclasses.replace(step, score=overlap, score_name="IoU")


def _drawn(scan: Scan, name: str, folder: str, case: Case | None) -> Step:
    """A mask, judged if its truth is known; a scan where the model draws nothing is a finding, not an error."""
    from m3d.inference.scan import NoMask

    try:
        result = scan.segment(name)
    except NoMask as error:
        step = Step(folder, f"mask of the {name}", None, problem=str(error))
    else:
        step = Step(folder, f"mask of the {name}", result, problem=_drawing_problem(result, name))
    truth = _truth(case, name)
    if case is None or truth is None or not truth.any():
        return step
    asked_for = [] if step.result is None else [mask.array for mask in step.result.masks if _same(mask.name, name)]
    score = hard_dice(asked_for[0], truth) if asked_for else 0.0  # another structure's mask is no mask of this one
    volume = f"{truth.sum() * case.volume.voxel_ml:.1f} mL"
    return dataclasses.replace(step, truth=volume, score=score, score_name="Dice")


def _drawing_problem(result: Result, name: str) -> str:
    if not any(mask.array.any() for mask in result.masks):
        return "the model drew nothing in this scan"
    others = [mask for mask in result.masks if not _same(mask.name, name)]
    if len(others) == len(result.masks):
        drawn = ", ".join(f"{mask.name} ({mask.volume_ml:.1f} mL)" for mask in others)
        return f"the model drew something else: {drawn}"
    return ""


def _same(said: str, asked: str) -> bool:
    return said.strip().casefold() == asked.strip().casefold()


def hard_dice(guess: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    """Dice of two masks voxel by voxel; 1 where there is nothing to find and nothing was found."""
    total = int(guess.sum()) + int(truth.sum())
    return 2 * int((guess & truth).sum()) / total if total else 1.0


def _truth(case: Case | None, name: str) -> npt.NDArray[np.bool_] | None:
    return case.mask(name) if case is not None and name in case.names.values() else None


def _phantom_file(chosen: Chosen) -> list[str]:
    return [PHANTOM] if chosen.kind == "phantom" else []


def _facts(scan: Scan, chosen: Chosen, steps: Sequence[Step]) -> dict[str, Any]:
    from m3d.inference.planes import NOTICE
    from m3d.inference.results import describe_scan

    return {
        "schema": "m3d.demo/1",
        "scan": {"source": chosen.kind, "why": list(chosen.reasons), **describe_scan(scan.volume, scan.path)},
        "model_id": scan.model_id,
        "steps": [
            {
                "what": step.what,
                "folder": step.folder if step.result is not None else None,
                "problem": step.problem,
                "truth": step.truth,
                "score": None if step.score is None else round(step.score, 4),
                "score_name": step.score_name,
                "result": None if step.result is None else step.result.to_dict(),
            }
            for step in steps
        ],
        "notice": NOTICE,
    }


def _save_whole(
    arguments: argparse.Namespace, chosen: Chosen, steps: Sequence[Step], facts: dict[str, Any]
) -> list[Path]:
    """What belongs to no single step: the summary, one picture of everything, and the phantom itself."""
    from data_prep.write import write_volume
    from m3d.inference.overlay import save_overlay
    from m3d.inference.results import PICTURE_BYTES, staged, write_json

    results = [step.result for step in steps if step.result is not None]
    findings = [finding for result in reversed(results) for finding in result.findings]
    seen = [found for found in findings if found.visible]
    names = [*_phantom_file(chosen), *([OVERVIEW] if seen else []), FACTS]
    needed = PICTURE_BYTES + (chosen.volume.array.nbytes if chosen.kind == "phantom" else 0)
    with staged(arguments.out, names, force=arguments.force, needed=needed) as stage:
        if PHANTOM in names:
            write_volume(stage / PHANTOM, chosen.volume)
        if OVERVIEW in names:
            notes = [f"Drawn by {facts['model_id']} ({'a phantom' if PHANTOM in names else 'a scan'}, m3d demo)."]
            save_overlay(stage / OVERVIEW, chosen.volume, seen, title="What the model found", notes=notes)
        write_json(stage / FACTS, facts)
    if OVERVIEW not in names:
        (arguments.out / OVERVIEW).unlink(missing_ok=True)  # of an earlier run, replaced with --force
    return [arguments.out / name for name in names]


def _say_table(scan: Scan, chosen: Chosen, steps: Sequence[Step], facts: dict[str, Any], files: Sequence[Path]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out, volume = files[-1].parent, chosen.volume
    spacing = " x ".join(f"{side:.3g}" for side in volume.spacing)
    table = Table(title=f"{scan.model_id} on {_title(chosen)}", title_justify="left", show_lines=True)
    for heading, style in COLUMNS.items():
        table.add_column(heading, style=style, overflow="fold")
    for step in steps:
        score = "" if step.score is None else f"{step.score_name} {step.score:.2f}"
        folder = str(out / step.folder) if step.result is not None else ""
        table.add_row(step.what, escape(_words(step)), escape(step.truth), score, escape(folder))
    screen = console()
    screen.print(table)
    shape = " x ".join(map(str, volume.shape))
    screen.print(f"{shape} voxels of {spacing} mm, {volume.orientation}; every mask has exactly this grid.")
    for warning in scan.warnings:
        screen.print(f"[yellow]warning[/] {escape(warning)}")
    screen.print(
        f"All of it: {escape(str(out / FACTS))}, {escape(str(out / OVERVIEW))}. {facts['seconds']:.1f} s in all."
    )
    if chosen.kind == "phantom":
        screen.print(f'Now you: m3d ask {escape(str(out / PHANTOM))} "How large is the mandible?"')
    screen.print(f"[bold yellow]{facts['notice']}[/]")


def _title(chosen: Chosen) -> str:
    if chosen.kind == "phantom":
        return "a phantom"
    assert chosen.path is not None
    return f"{chosen.path.parent.name}/{chosen.path.name}" if chosen.case is not None else chosen.path.name


def _words(step: Step) -> str:
    """What the model said, in the table."""
    if step.result is None or step.problem:
        said = f" ({shortened(step.result.text)})" if step.result is not None and step.result.text else ""
        return f"{shortened(step.problem)}{said}"
    if step.result.masks and step.what.startswith("mask"):
        return ", ".join(f"{mask.name}: {mask.volume_ml:.1f} mL, score {mask.score:.2f}" for mask in step.result.masks)
    if step.result.boxes and step.what.startswith("box"):
        box = step.result.boxes[0]
        lo, hi = (", ".join(f"{side:.0f}" for side in corner) for corner in (box.voxel.lo, box.voxel.hi))
        return f"voxels ({lo}) to ({hi}), {' x '.join(f'{side:.0f}' for side in box.mm.sides)} mm"
    rests_on = step.folder == "answer" and step.result.measured
    return printable(step.result.text + (f" ({'; '.join(map(str, step.result.measured))})" if rests_on else ""))
