"""Bytes and read times of the formats in which a prepared volume could be kept; the choice of `data_prep.store`.

One volume (an OpenKBP case, or our phantom without the data) on the published grid 32 x 256 x 256; all formats are read
in turn, many times, with a warm page cache. ``python benchmarks/store_formats.py --data PATH/openkbp``
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import safetensors.numpy
import zarr
from zarr.codecs import BloscCodec

from data_prep.atomic import atomic_path
from data_prep.openkbp import cases, read_case
from data_prep.phantoms import head_neck
from data_prep.preprocess import Foreground, Preprocess, Window
from data_prep.store import pack, unpack

RESULT = Path(__file__).parent / "results" / "store_formats.json"
GRID = (32, 256, 256)
ROUNDS = 40


def formats(array: np.ndarray) -> dict[str, tuple[Callable[[Path], object], Callable[[Path], np.ndarray]]]:
    """How each format is written and read whole."""
    cparams = {"codec": blosc2.Codec.ZSTD, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE]}
    fast = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE]}
    compressor = BloscCodec(cname="zstd", clevel=5)
    chunks = (8, 64, 64)
    return {
        "npy": (lambda path: np.save(path.open("wb"), array), lambda path: np.load(path)),
        "npz": (
            lambda path: np.savez_compressed(path.open("wb"), array=array),
            lambda path: np.load(path.open("rb"))["array"],
        ),
        "safetensors": (
            lambda path: safetensors.numpy.save_file({"array": array}, path),
            lambda path: safetensors.numpy.load_file(path)["array"],
        ),
        "blosc2 zstd": (
            lambda path: blosc2.asarray(array, urlpath=str(path), mode="w", cparams=cparams),
            lambda path: blosc2.open(str(path), mode="r")[:],
        ),
        "blosc2 lz4": (
            lambda path: blosc2.asarray(array, urlpath=str(path), mode="w", cparams=fast),
            lambda path: blosc2.open(str(path), mode="r")[:],
        ),
        "zarr zstd": (
            lambda path: zarr.create_array(path, data=array, chunks=chunks, compressors=compressor, overwrite=True),
            lambda path: zarr.open_array(path, mode="r")[:],
        ),
        "nii.gz": (
            lambda path: nib.save(nib.Nifti1Image(array, np.eye(4)), path),
            lambda path: np.asarray(nib.load(path).dataobj),
        ),
    }


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def measure(array: np.ndarray, folder: Path) -> dict[str, dict[str, float]]:
    """MiB and the median milliseconds of reading each format, in turn, so that none has the quieter machine."""
    table = formats(array)
    paths = {name: folder / f"{name.replace(' ', '_')}{'.nii.gz' if name == 'nii.gz' else ''}" for name in table}
    for name, (write, read) in table.items():
        write(paths[name])
        assert np.array_equal(read(paths[name]), array), name
    times: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(ROUNDS):
        for name, (_, read) in table.items():
            begun = time.perf_counter()
            read(paths[name])
            times[name].append(1000 * (time.perf_counter() - begun))
    return {
        name: {"mib": round(size(paths[name]) / 2**20, 3), "read_ms": round(statistics.median(times[name]), 3)}
        for name in table
    }


def main() -> None:
    """Measure, say and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "openkbp")
    given = parser.parse_args()
    case = read_case(cases(given.data, "train")[0]) if given.data.is_dir() else head_neck(0)
    job = Preprocess(grid=GRID, intensity=Window(-200, 400), crop=Foreground(above=-400.0))
    prepared = job.apply(case.volume)
    labels = prepared.mask_to_grid(case.labels)
    results = {
        "volume": case.id,
        "grid": list(GRID),
        "rounds": ROUNDS,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "formats": {},
    }
    stored_hu = np.rint(prepared.array * 600 - 200).astype(np.int16)
    kinds = {"float32 [0,1]": prepared.array, "int16 HU": stored_hu, "uint8 [0,1]": pack(prepared.array, "uint8")}
    with tempfile.TemporaryDirectory() as temporary:
        for kind, array in {**kinds, "labels uint8": labels}.items():
            folder = Path(temporary) / kind.replace("/", "_")
            folder.mkdir()
            results["formats"][kind] = measure(np.ascontiguousarray(array), folder)
    worst = float(np.abs(unpack(pack(prepared.array, "uint8")) - prepared.array).max() * 600)
    results["largest error of uint8 in a 600 HU window, HU"] = round(worst, 3)
    whole, ours = results["formats"]["float32 [0,1]"]["npy"], results["formats"]["uint8 [0,1]"]["npy"]
    results["against float32 npy"] = {
        "bytes": round(whole["mib"] / ours["mib"], 2),
        "read time": round(whole["read_ms"] / ours["read_ms"], 2),
    }
    with atomic_path(RESULT) as path:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for kind, table in results["formats"].items():
        print(f"\n{kind:16} {'MiB':>8} {'read ms':>8}")
        for name, row in sorted(table.items(), key=lambda item: item[1]["read_ms"]):
            print(f"{name:16} {row['mib']:8.3f} {row['read_ms']:8.2f}")
    print(f"\nuint8 npy against float32 npy: {results['against float32 npy']}; kept in {RESULT.name}")


if __name__ == "__main__":
    main()
