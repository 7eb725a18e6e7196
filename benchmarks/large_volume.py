"""What a large scan takes: seconds and peak memory of ``m3d segment``, without and with ``--zoom``.

    python benchmarks/large_volume.py [--model NAME_OR_FOLDER] [--shape 512,512,400] [--zooms without,2,native]

The scan is the project's head-and-neck phantom at 0.9 x 0.9 x 1.0 mm, kept as int16 in a NIfTI file. Each row is one
whole command in a process of its own: starting, reading, loading the model, looking, drawing, and writing mask,
picture and JSON. Its peak is the largest resident size that the kernel saw. The mandible is drawn by its name, by a
click in its middle and by its box. The result is ``benchmarks/results/large_volume.json``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tiny_accuracy import folder_and_name, machine_facts, model_facts

from data_prep.atomic import atomic_path
from data_prep.boxes import box_of_mask
from data_prep.case import Case
from data_prep.phantoms import head_neck
from m3d.bench.metrics.masks import Dice, MaskPair
from m3d.bench.simulated import deepest_voxel

HOME = Path(__file__).parents[1]
RESULTS = HOME / "benchmarks" / "results"
SPACING, ORIENTATION, SEED, STRUCTURE = (0.9, 0.9, 1.0), "LPS", 7, "mandible"
WITHOUT = "without"
LAUNCHER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""
"""A small process between: Linux counts what the parent of a command holds as the command's own peak."""


def write_scan(path: Path, case: Case) -> None:
    """A CT as scanners' converters write it: int16, gzip."""
    image = nib.Nifti1Image(np.round(case.volume.array).astype(np.int16), case.volume.affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)


def prompts(case: Case) -> dict[str, list[str]]:
    """How the structure is asked for on the command line, by way."""
    truth = case.mask(STRUCTURE)
    click = ",".join(map(str, deepest_voxel(truth, case.volume.spacing)))
    box = box_of_mask(truth)
    corners = ",".join(str(int(side)) for side in (*box.lo, *box.hi))
    return {"name": [STRUCTURE], "click": ["--point", click], "box": ["--box", corners]}


def warmed_up(cache: Path) -> dict[str, str]:
    """The environment of a command whose modules have been compiled before, as of an installed one."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    modules = "m3d.inference.load, m3d.inference.overlay, monai.inferers.utils, monai.networks.nets.segresnet"
    subprocess.run([sys.executable, "-c", f"import m3d; import {modules}"], env=environment, check=True)
    return environment


def timed(command: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    """Wall and CPU seconds of a command, and its largest resident size in MB.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    began = time.monotonic()
    launched = [sys.executable, "-c", LAUNCHER, *command]
    said = subprocess.run(launched, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    seconds, (cpu, resident) = time.monotonic() - began, map(float, said.split())
    kilobytes = resident / (1024 if sys.platform == "darwin" else 1)  # bytes there, kB elsewhere
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_mb": round(kilobytes / 1000)}


def measure(scan: Path, case: Case, model: str, way: str, zoom: str, environment: dict[str, str]) -> dict[str, Any]:
    """One command, and how well it drew."""
    asked = [*prompts(case)[way], *([] if zoom == WITHOUT else [f"--zoom={zoom}"])]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "m3d.cli", "segment", str(scan), *asked, "--model", model, "--out", out]
        row: dict[str, Any] = timed(command, environment)
        written = json.loads((Path(out) / "result.json").read_text(encoding="utf-8"))
        mask = np.asarray(nib.load(Path(out) / written["masks"][0]["file"]).dataobj) > 0
    d, h, w = case.volume.spacing
    row["dice"] = round(float(Dice().value(MaskPair("", mask, case.mask(STRUCTURE), (d, h, w)))), 3)
    return {"way": way, "zoom": zoom, "drawn_at_mm": written["drawn_at_mm"], **row}


def main() -> None:
    """Make the scan, run the commands one after the other, keep what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="m3d-tiny", help="a bundled model's name, or a folder")
    parser.add_argument("--shape", default="512,512,400", help="voxels (%(default)s)")
    parser.add_argument("--zooms", default=f"{WITHOUT},2,native")
    parser.add_argument("--ways", default="name,click,box")
    parser.add_argument("--out", type=Path, default=RESULTS / "large_volume.json")
    given = parser.parse_args()
    d, h, w = map(int, given.shape.split(","))
    folder, name = folder_and_name(given.model, None)
    case = head_neck(SEED, shape=(d, h, w), spacing=SPACING, orientation=ORIENTATION)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        scan = Path(temporary) / "large.nii.gz"
        write_scan(scan, case)
        environment = warmed_up(Path(temporary) / "compiled")
        for zoom in given.zooms.split(","):
            for way in given.ways.split(","):
                rows.append(measure(scan, case, str(folder), way, zoom, environment))
                print(rows[-1], flush=True)
        size = scan.stat().st_size
    result = {
        "command": "python benchmarks/large_volume.py",
        **model_facts(name, folder),
        "scan": {"shape": [d, h, w], "spacing_mm": list(SPACING), "file_bytes": size, "phantom": SEED},
        "structure": STRUCTURE,
        **machine_facts(),
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(given.out) as path:
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"kept in {given.out}")


if __name__ == "__main__":
    main()
