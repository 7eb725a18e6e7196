"""`m3d calibrate MODEL --data STORE`: teach a model to say how likely a structure is in the scan at all."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from m3d.cli.common import check_out, note, say, say_json
from m3d.cli.data.prepare import count

DESCRIPTION = """\
Fit how likely a structure is in a scan, from what the model says and draws when it is asked for structures that
certainly are, or certainly are not, in the scans of a store; then judge the fit on scans of another split. The fit is
kept as presence.json beside the model's weights; from then on every mask that is asked for by name has `present`, and
what is below 0.5 is reported as probably not in the scan and left out of label maps.
"""
EPILOG = """\
What is certain: a label with voxels is there. A label without voxels is not there where the store's labels are
complete, as those of phantoms are; in a clinical data set a missing contour says nothing, and is not asked for. With
--never you name what no scan of the stores shows. A fit needs structures of both kinds; beside phantoms, give a store
of patients, so that the fit knows what their structures look like.

What comes out: presence.json in MODEL, and in --out (default: calibration)
  answers.jsonl       what every scan was asked, as it goes: stopped, the same command goes on where it was
  calibration.json    AUC, Brier score, expected calibration error (ten bins of equally many), recall of both kinds
  reliability.png     what is said against how often it is so

The probability holds for scans like those it was fitted to, and for how often structures are missing there. It belongs
to these very weights: after more training, calibrate again.

examples:
  m3d data prepare configs/data/phantoms.yaml --out stores/phantoms
  m3d calibrate m3d-tiny --data stores/phantoms stores/openkbp --force    anew, on all their training scans
  m3d calibrate runs/instruct/model --data stores/mine --limit 100 --never liver "left kidney"
"""
ANSWERS, REPORT, PICTURE = "answers.jsonl", "calibration.json", "reliability.png"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.set_defaults(out=Path("calibration"))
    parser.add_argument("model", metavar="MODEL", help="a bundled model's name, or a checkpoint folder")
    group = parser.add_argument_group("what it is fitted to and judged on")
    group.add_argument(
        "--data", type=Path, nargs="+", metavar="STORE", required=True, help="a store of `m3d data prepare`, or several"
    )
    group.add_argument("--split", default="train", help="the scans that it is fitted to (train)")
    group.add_argument("--judge", metavar="SPLIT", default="validation", help="those that it is judged on (validation)")
    group.add_argument("--limit", type=count(2), metavar="N", help="only the first N scans of each")
    group.add_argument("--never", nargs="+", metavar="NAME", default=[], help="structures that no scan of it shows")


def run(arguments: argparse.Namespace) -> int:
    """Ask, fit, judge, keep."""
    import torch

    import m3d
    from data_prep.atomic import refuse_overwrite
    from data_prep.store import file_sha256
    from m3d.bench.calibrate import Answers, ask_scans, check_splits, fit_to, judge
    from m3d.bench.reliability import draw_reliability
    from m3d.inference.checkpoints import HEAD, kind_of, resolve, weights_sha256
    from m3d.inference.presence import PRESENCE_NAME
    from m3d.inference.results import write_json

    folder = resolve(arguments.model)
    if kind_of(folder) == HEAD:
        raise ValueError(f"{folder} has no language model, whose words presence weighs; calibrate a whole checkpoint")
    refuse_overwrite(folder / PRESENCE_NAME, arguments.force)
    check_out(arguments, [REPORT, PICTURE])
    if arguments.split == arguments.judge:
        raise ValueError(f"--split and --judge are both {arguments.split!r}: a fit is judged on scans it has not seen")
    for store in arguments.data:
        if not (store / "records.jsonl").is_file():
            raise FileNotFoundError(f"{store}: no store of `m3d data prepare` is there")
    stores = list(arguments.data)
    check_splits(stores, arguments.split, arguments.judge)
    torch.set_flush_denormal(True)
    weights = weights_sha256(folder)
    about = {
        "weights_sha256": weights,
        "data": [file_sha256(store / "images.jsonl") for store in stores],
        "never": arguments.never,
    }
    answers = Answers(arguments.out / ANSWERS, about, anew=arguments.force)
    model = m3d.load(folder, device=arguments.device, calibrated=False)  # an earlier fit may be broken
    ask = partial(ask_scans, model, answers=answers, never=arguments.never, limit=arguments.limit)
    asked = [one for store in stores for one in ask(store, arguments.split)]
    judged = {name: ask(store, arguments.judge) for name, store in _named(stores).items()}
    presence = fit_to(asked, weights=weights, stores=stores, split=arguments.split)
    path = presence.write(folder)
    for name in (name for name, some in judged.items() if not some):
        note(f"{name}: nothing is certain of its {arguments.judge!r} scans; the fit is not judged on them")
    report: dict[str, Any] = {
        "model": folder.name,
        "presence": presence.to_dict(),
        "fitted": judge(presence, asked),
        "judged": {name: judge(presence, some) for name, some in judged.items() if some},
    }
    draw_reliability(arguments.out / PICTURE, report["judged"], f"{folder.name}: is it in the scan?")
    write_json(arguments.out / REPORT, report)
    if arguments.json:
        say_json(report)
        return 0
    _print(report)
    for saved in (path, arguments.out / REPORT, arguments.out / PICTURE):
        note(f"saved {saved}")
    return 0


def _named(stores: Sequence[Path]) -> dict[str, Path]:
    """Stores by the last part of their path, all of them numbered where two have the same."""
    names = [store.absolute().name for store in stores]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    return dict(zip(names, stores, strict=True))


def _print(report: dict[str, Any]) -> None:
    weights = ", ".join(f"{name} {weight:+.3g}" for name, weight in report["presence"]["weights"].items())
    say(f"fit: {weights}, bias {report['presence']['bias']:+.3g}")
    for name, found in {"what it was fitted to": report["fitted"], **report["judged"]}.items():
        say(f"{name}: {found['there']} structures that are there, {found['not there']} that are not")
        for measure in ("auc", "brier", "there, called there", "not there, called not there"):
            say(f"  {measure:28} {_shown(found[measure])}")
        say(f"  {'ece':28} {found['ece']:.3f}")
        for one in found["bins"]:
            say(f"    said {one['said']:.3f}, is {one['true']:.3f} ({one['n']})")


def _shown(estimate: dict[str, float | None]) -> str:
    if estimate["value"] is None:
        return "-"
    low, high = estimate["low"], estimate["high"]
    return f"{estimate['value']:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")
