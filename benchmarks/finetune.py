"""Fine-tuning on one's own folder: what a model draws of structures that it did not know, before and after.

    python benchmarks/finetune.py --data PATH/openkbp [--checkpoint NAME_OR_FOLDER] [--steps N] [--limit N]

The folder is OpenKBP's validation patients, of whom the bundled model has not learned, in nnU-Net's layout, with three
structures under names that it has never been told: "parotid glands" is both contours in one; "airway" (air within the
body) and "bone" (above 300 HU) are truths by rule, of intensities alone, and so are easier than contours of a clinic.
The command is the one that a user would give, ``m3d train configs/segvol/finetune.yaml folder=FOLDER``; a fifth of the
patients is held out. Writes ``benchmarks/results/finetune.json``; of a run with ``--limit``, beside the run.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import m3d  # noqa: F401  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_closing, binary_opening, label
from tiny_accuracy import machine_facts
from tqdm import tqdm

from data_prep.atomic import atomic_path
from data_prep.case import Case
from data_prep.openkbp import cases, read_case
from m3d.config import find_config, load_config
from m3d.inference.checkpoints import resolve
from m3d.recipes import finetune
from m3d.recipes.checkpoints import fingerprint

HOME = Path(__file__).parents[1]
RESULT, WORK = HOME / "benchmarks" / "results" / "finetune.json", HOME / "runs" / "finetune_benchmark"
CONFIG = "configs/segvol/finetune.yaml"
NAMES = ("parotid glands", "airway", "bone")
AIR_HU, BODY_HU, BONE_HU = -600.0, -300.0, 300.0

Mask = npt.NDArray[np.bool_]


def main() -> None:
    """Write the folder, fine-tune, and keep what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="OPENKBP", help="its converted folder")
    parser.add_argument("--checkpoint", default="m3d-tiny", metavar="NAME_OR_FOLDER")
    parser.add_argument("--steps", type=int, default=None, metavar="N", help="in place of the config's")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N patients, to try it out")
    parser.add_argument("--out", type=Path, default=WORK, metavar="DIR", help="folder, store and model (runs/...)")
    arguments = parser.parse_args()
    folder, output = arguments.out / "Dataset001_HeadNeck", arguments.out / "run"
    patients = cases(arguments.data, "validation")[: arguments.limit]
    if not (folder / "dataset.json").is_file():
        write_folder(folder, patients)
    words = [f"folder={folder}", f"output={output}", f"checkpoint={arguments.checkpoint}"]
    words += [] if arguments.steps is None else [f"optim.steps={arguments.steps}"]
    config = load_config(finetune.Config, find_config(Path(CONFIG)), words)
    manifest = finetune.main(config, resume=(output / "begun.json").is_file())
    found = json.loads((output / finetune.HELD_OUT).read_text(encoding="utf-8"))
    result: dict[str, Any] = {
        "what": "fine-tuning on one's own folder: Dice before and after, on patients that were held out",
        "command": "python benchmarks/finetune.py --data PATH/openkbp"
        + (f" --steps {arguments.steps}" if arguments.steps is not None else ""),
        **machine_facts(),
        "checkpoint": Path(arguments.checkpoint).name,
        "fingerprint": fingerprint(resolve(arguments.checkpoint)),
        "patients": len(patients),
        "held_out": len({row["case"] for row in found["after"]["rows"]}),
        "steps": manifest["steps"],
        "seconds": manifest["wall_seconds"],
        **found,
    }
    with atomic_path(RESULT if arguments.limit is None else arguments.out / RESULT.name) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(finetune.table(found))


def write_folder(folder: Path, patients: list[Path]) -> None:
    """The patients in nnU-Net's layout; ``dataset.json`` is written last."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for patient in tqdm(patients, desc="writing", unit="scan"):
        case = read_case(patient)
        affine = case.volume.affine
        scan = nib.Nifti1Image(case.volume.array.astype(np.int16), affine)
        nib.save(scan, folder / "imagesTr" / f"{patient.name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(labels_of(case), affine), folder / "labelsTr" / f"{patient.name}.nii.gz")
    described = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{name: value for value, name in enumerate(NAMES, start=1)}},
        "numTraining": len(patients),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def labels_of(case: Case) -> npt.NDArray[np.uint8]:
    """The three structures of a patient, ``(D, H, W)``; contours lie above rules."""
    array, labels = case.volume.array, np.zeros(case.volume.shape, np.uint8)
    labels[binary_opening(array > BONE_HU)] = 3
    labels[airway(array)] = 2
    for side in ("left parotid", "right parotid"):
        if side in case.names.values():
            labels[case.mask(side)] = 1
    return labels


def airway(array: npt.NDArray[np.floating[Any]]) -> Mask:
    """Air that is not joined to the air around the body, slice by slice along the body's axis."""
    found = np.zeros(array.shape, bool)
    for number in range(array.shape[2]):
        body = binary_closing(array[:, :, number] > BODY_HU, iterations=2)
        parts, _ = label(np.pad(~(array[:, :, number] > BODY_HU), 1, constant_values=True))
        outside = (parts == parts[0, 0])[1:-1, 1:-1]
        found[:, :, number] = (array[:, :, number] < AIR_HU) & ~outside & body
    return np.asarray(binary_opening(found))


if __name__ == "__main__":
    main()
