"""Whether a model knows what is not in a scan: its calibrated presence, on phantoms and on patients.

    python benchmarks/presence.py --phantoms STORE --openkbp STORE [--model NAME_OR_FOLDER] [--ship] [--limit N]

It is fitted, as `m3d calibrate` does, to phantoms of the training split, of which a tenth of the structures was left
out, and to patients of the training split, of whom only what is there is certain (`FITTED` of each), and judged on

- ``phantoms``: `JUDGED` of the validation split;
- ``patients``: the OpenKBP validation patients. What is contoured is there; what is not contoured is not asked for;
- ``cut patients``: the same, of whom one part is shown: below the brainstem, the parotids and the mandible, or above
  the larynx, by `MARGIN` mm. What lies wholly outside of it is not there, what lies wholly inside is. The cord and the
  esophagus are never said to be absent: their contours end where somebody stopped;
- ``strangers``: structures of the abdomen, whose names the model has not learned and which no such scan shows. The fit
  knows nothing of them, and `Presence.of` says nothing; this is what it would say.

With ``--ship`` the fit is kept as ``presence.json`` of the model. Answers go to ``runs/presence``, scan by scan, so
that a run that was stopped goes on. The result is ``benchmarks/results/presence.json``, its picture
``docs/presence.png``; of a run with ``--limit`` both stay beside the answers.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import m3d  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import numpy as np
import numpy.typing as npt
import torch
from tiny_accuracy import folder_and_name, machine_facts, model_facts
from tqdm import tqdm

from data_prep.atomic import atomic_path
from data_prep.store import Store, StoredImage, file_sha256
from data_prep.volume import Volume
from m3d.bench.calibrate import Answers, Asked, ask_scans, fit_to, judge
from m3d.bench.reliability import draw_reliability
from m3d.inference.checkpoints import weights_sha256
from m3d.inference.presence import signs_of

HOME = Path(__file__).parents[1]
RESULTS, WORK = HOME / "benchmarks" / "results", HOME / "runs" / "presence"
FITTED, JUDGED, MARGIN = {"phantoms": 96, "patients": 48}, 64, 10.0
HEAD, NECK = ("brainstem", "right parotid", "left parotid", "mandible"), ("larynx",)
STRANGERS = ("liver", "left kidney", "prostate", "urinary bladder")


# -- patients of whom a part is shown ---------------------------------------------------------------------------------


def parts(image: StoredImage) -> Iterator[tuple[str, Volume, dict[str, bool]]]:
    """The lower and the upper part of a stored patient, and what certainly is in it or is not.

    The grid's first axis runs from the feet to the head.
    """
    labels, names = image.labels(), {name: value for value, name in image.names.items()}
    volume, step = Volume(image.values(), image.affine), image.media.spacing_mm
    assert step is not None and volume.orientation[0] == "S"
    margin = round(MARGIN / step[0])
    rows = {name: _rows(labels, value) for name, value in names.items()}
    head = [rows[name][0] for name in HEAD if rows[name]]
    if len(head) == len(HEAD):  # one that is not contoured may be in either part
        yield from _shown("lower", volume, (0, min(head) - margin), rows)
    neck = [rows[name][1] for name in NECK if rows[name]]
    if neck:
        yield from _shown("upper", volume, (max(neck) + margin, labels.shape[1]), rows)


def _shown(
    which: str, volume: Volume, span: tuple[int, int], rows: dict[str, tuple[int, int] | tuple[()]]
) -> Iterator[tuple[str, Volume, dict[str, bool]]]:
    """The rows ``span`` of a volume, unless they are too few for a scan."""
    first, last = span
    if last - first < volume.shape[0] // 5:
        return
    known = {}
    for name, own in rows.items():
        if own and first <= own[0] and own[1] <= last:
            known[name] = True
        elif own and name in (*HEAD, *NECK) and (own[1] <= first or own[0] >= last):
            known[name] = False
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, 0] * first
    yield which, Volume(np.ascontiguousarray(volume.array[first:last]), affine), known


def _rows(labels: npt.NDArray[Any], value: int) -> tuple[int, int] | tuple[()]:
    """First row of a structure and one past its last; none where it has no voxels."""
    there = np.flatnonzero((labels == value).any(axis=(0, 2, 3)))
    return (int(there[0]), int(there[-1]) + 1) if len(there) else ()


def ask_parts(model: m3d.M3D, store: Path, answers: Answers, limit: int | None) -> list[Asked]:
    """Ask for all that is certain of the parts of the validation patients."""
    images = [image for image in Store(store).images.values() if image.split == "validation"][:limit]
    for image in tqdm(images, unit="patient", desc="cut patients"):
        if image.image_id in answers.lines:
            continue
        asked = []
        for _, volume, known in parts(image):
            found = signs_of(model.look(volume), list(known))
            about = zip(known.items(), found, strict=True)
            asked += [Asked(image.patient_id, name, there, signs) for (name, there), signs in about]
        answers.add(image.image_id, asked)
    return [one for image in images for one in answers.lines[image.image_id]]


# -- the result -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Ask, fit, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phantoms", type=Path, required=True, help="a store of the project's phantoms")
    parser.add_argument("--openkbp", type=Path, required=True, help="a store of OpenKBP")
    parser.add_argument("--model", default="m3d-tiny", help="a bundled model's name, or a folder")
    parser.add_argument("--ship", action="store_true", help="keep the fit as the model's presence.json")
    parser.add_argument("--limit", type=int, help="only the first scans of each set")
    given = parser.parse_args()
    for store in (given.phantoms, given.openkbp):
        if not (store / "images.jsonl").is_file():
            print(f"{store} is no store of `m3d data prepare`; nothing measured")
            return
    torch.set_flush_denormal(True)
    folder, name = folder_and_name(given.model, None)
    weights, model = weights_sha256(folder), m3d.load(folder, device="cpu", calibrated=False)

    def kept(what: str, store: Path) -> Answers:
        about = {"weights_sha256": weights, "data": file_sha256(store / "images.jsonl"), "strangers": list(STRANGERS)}
        return Answers(WORK / f"{name}_{what}.jsonl", about, anew=True)

    fitted = {what: min(most, given.limit or most) for what, most in FITTED.items()}
    phantoms, patients = kept("phantoms", given.phantoms), kept("patients", given.openkbp)
    asked = [
        *ask_scans(model, given.phantoms, "train", phantoms, limit=fitted["phantoms"]),
        *ask_scans(model, given.openkbp, "train", patients, limit=fitted["patients"]),
    ]
    presence = fit_to(asked, weights=weights, stores=[given.phantoms, given.openkbp], split="train")
    whole = ask_scans(
        model, given.openkbp, "validation", kept("strangers", given.openkbp), never=STRANGERS, limit=given.limit
    )
    sets: dict[str, Sequence[Asked]] = {
        "what it was fitted to": asked,
        "phantoms": ask_scans(model, given.phantoms, "validation", phantoms, limit=min(JUDGED, given.limit or JUDGED)),
        "patients": [one for one in whole if one.name not in STRANGERS],
        "cut patients": ask_parts(model, given.openkbp, kept("parts", given.openkbp), given.limit),
        "strangers": [one for one in whole if one.name in STRANGERS],
    }
    judged = {what: judge(presence, some) for what, some in sets.items()}
    out, picture = RESULTS / "presence.json", HOME / "docs" / "presence.png"
    if given.limit:
        out, picture = (WORK / f"first_{given.limit}_{path.name}" for path in (out, picture))
    result = {
        "command": "python benchmarks/presence.py",
        **model_facts(name, folder),
        "presence": presence.to_dict(),
        "fitted": fitted,
        "margin_mm": MARGIN,
        **machine_facts(),
        "sets": judged,
    }
    with atomic_path(out) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    both = {what: judged[what] for what in ("phantoms", "cut patients")}
    draw_reliability(picture, both, f"{name}: is it in the scan?")
    if given.ship:
        print(f"kept in {presence.write(folder)}")
    for what, found in judged.items():
        shares = [found[key]["value"] for key in ("auc", "there, called there", "not there, called not there")]
        print(what, found["n"], *("-" if one is None else f"{one:.3f}" for one in shares), f"ece {found['ece']:.3f}")


if __name__ == "__main__":
    main()
