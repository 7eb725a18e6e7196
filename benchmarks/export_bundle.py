"""What a MONAI bundle of the mask head draws beside the model it was made of, on the OpenKBP validation patients.

    python benchmarks/export_bundle.py --data PATH/openkbp [--model NAME_OR_FOLDER] [--limit N]

The bundle has no language model: its names are vectors that were read without a volume. Both draw every contoured
structure by name, by one click (the deepest voxel of the truth) and by the truth's box; the bundle goes by its own
``inference.json``, from a NIfTI, without MONAI's engine around it. ``agreement`` is the Dice of the two masks, and
``equal`` in how many not one voxel differs. The result is ``benchmarks/results/export_bundle.json``.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import m3d  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import numpy as np
import torch
from monai.bundle import ConfigParser
from scoring import FIVE, Mask
from tiny_accuracy import HOME, RESULTS, folder_and_name, machine_facts, model_facts
from tqdm import tqdm

from data_prep.atomic import atomic_path
from data_prep.boxes import box_of_mask
from data_prep.case import Case
from data_prep.openkbp import NAMES, cases, read_case
from data_prep.write import write_volume
from m3d.bench.metrics.masks import Dice, MaskPair
from m3d.bench.simulated import deepest_voxel
from m3d.export.bundle import WORDINGS, export_bundle

KINDS = ("name", "click", "box")


class Bundle:
    """A bundle's own configuration, with the network read once."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self.scratch = folder, scratch
        self.network = self._parser().get_parsed_content("network")

    def draw(self, image: Path, name: str | None, **prompts: object) -> Mask:
        """One structure's mask on the scan's grid."""
        parser = self._parser(image=str(image), **prompts)
        item = parser.get_parsed_content("dataset")[0]
        self.network.structures = () if name is None else (name,)
        batch = {key: one[None] for key, one in item["prompts"].items()}
        with torch.inference_mode():
            item["pred"] = parser.get_parsed_content("inferer")(item["image"][None], self.network, **batch)[0]
        return np.asarray(parser.get_parsed_content("postprocessing")(item)["pred"])[0].astype(bool)

    def _parser(self, **given: object) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config(self.folder / "configs" / "inference.json")
        parser.update({"bundle_root": str(self.folder), "device": "cpu", "output_dir": str(self.scratch), **given})
        parser.parse()
        return parser


def rows_of(case: Case, model: m3d.M3D, bundle: Bundle, scratch: Path) -> list[dict[str, Any]]:
    """All that both draw of a patient."""
    image = scratch / "ct.nii.gz"
    write_volume(image, case.volume)
    scan, found = model.look(image), []
    for name in case.present:
        truth = case.mask(name)
        click, box = deepest_voxel(truth, case.volume.spacing), box_of_mask(truth)
        corners = [*map(int, box.lo), *map(int, box.hi)]
        ours = {
            "name": lambda name=name: scan.segment(name),
            "click": lambda click=click: scan.segment(points=[(click, 1)]),
            "box": lambda box=box: scan.segment(box=box),
        }
        theirs = {"name": {}, "click": {"points": [[*click, 1]]}, "box": {"box": corners}}
        for kind in KINDS:
            try:
                one = ours[kind]().masks[0].array
            except m3d.NoMask:  # a refusal counts as an empty mask
                one = np.zeros_like(truth)
            other = bundle.draw(image, name if kind == "name" else None, **theirs[kind])
            found.append({"patient": case.id, "item": name, "kind": kind, **_compared(one, other, truth, case)})
    return found


def _compared(one: Mask, other: Mask, truth: Mask, case: Case) -> dict[str, Any]:
    def dice(a: Mask, b: Mask) -> float:
        return float(Dice().value(MaskPair("", a, b, case.volume.spacing)))

    equal = bool(np.array_equal(one, other))
    agreement = 1.0 if equal else dice(other, one)
    return {"model": dice(one, truth), "bundle": dice(other, truth), "agreement": agreement, "equal": equal}


def table(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means by kind of prompt: over all masks, and over the five structures' own means."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        five: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in own:
            if row["item"] in FIVE:
                five[row["item"]].append(row)

        def mean(measure: str, five: dict[str, list[dict[str, Any]]] = five) -> float:
            return round(statistics.fmean(statistics.fmean(row[measure] for row in some) for some in five.values()), 4)

        found[kind] = {
            "n": len(own),
            "model, mean of five": mean("model"),
            "bundle, mean of five": mean("bundle"),
            "agreement, mean": round(statistics.fmean(row["agreement"] for row in own), 4),
            "agreement, median": round(statistics.median(row["agreement"] for row in own), 4),
            "agreement, lowest": round(min(row["agreement"] for row in own), 4),
            "equal": sum(row["equal"] for row in own),
        }
    return found


def main() -> None:
    """Export, draw, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HOME.parent / "shared" / "data" / "openkbp")
    parser.add_argument("--model", default="m3d-tiny", help="a bundled model's name, or a folder")
    parser.add_argument("--limit", type=int, help="only the first patients; the result is printed and not kept")
    given = parser.parse_args()
    if not given.data.is_dir():
        print(f"{given.data} is not here: give --data PATH/openkbp; nothing measured")
        return
    torch.set_flush_denormal(True)
    folder, name = folder_and_name(given.model, None)
    patients = cases(given.data, "validation")[: given.limit]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        export_bundle(folder, scratch / "bundle", list(NAMES.values()))
        bundle, model = Bundle(scratch / "bundle", scratch / "drawn"), m3d.load(folder, device="cpu")
        rows = [
            row for path in tqdm(patients, unit="patient") for row in rows_of(read_case(path), model, bundle, scratch)
        ]
    result = {
        "command": "python benchmarks/export_bundle.py",
        **model_facts(name, folder),
        "patients": len(patients),
        "wordings": WORDINGS,
        **machine_facts(),
        "metrics": table(rows),
    }
    print(json.dumps(result["metrics"], indent=1))
    if given.limit is None:
        with atomic_path(RESULTS / "export_bundle.json") as file:
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
