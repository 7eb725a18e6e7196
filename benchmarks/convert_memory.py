"""Peak memory, time and disk of `m3d convert` on folders of the released M3D-LaMed-Llama-2-7B's names and shapes.

    python benchmarks/convert_memory.py [--room DIR] [--shards 2 4 8] [--layers 32] [--dtype keep]

The weights are random bfloat16 (the released ones are float32, twice as large; --stored float32 makes such). Each
conversion runs in a process of its own, whose memory is read from the kernel every 50 ms: all of it (``peak_rss``), and
without the pages of mapped files (``peak_anonymous``), which the kernel may drop at any time. Writes
``benchmarks/results/convert_memory.json``, or ``convert_memory_float32.json`` where the folder is stored so. Needs
twice the size of one folder in ROOM.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AddedToken, LlamaTokenizer

from data_prep.atomic import atomic_path
from m3d.convert.layouts import Options
from m3d.convert.run import convert
from m3d.export.names import to_lamed
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DSegConfig, M3DVisionConfig

HOME = Path(__file__).parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LLAMA = {
    "model_type": "lamed_llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32004,
    "seg_token_id": 32003,
    "segmentation_module": "segvol",
}


def make(folder: Path, *, layers: int, shards: int, stored: torch.dtype) -> int:
    """Write a folder of that many layers in that many files; the bytes of its weights."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    fields = {**LLAMA, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    known = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 32000)}}
    tokenizer = LlamaTokenizer(vocab=known, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<im_patch>", "<bx_start>", "<bx_end>"]})
    tokenizer.add_tokens([AddedToken("[SEG]", special=False)])
    tokenizer.save_pretrained(folder)
    text = {name: one for name, one in fields.items() if name in LlamaConfig().to_dict() and name != "model_type"}
    with torch.device("meta"):
        model = M3DForConditionalGeneration(
            M3DConfig(
                vision_config=M3DVisionConfig(),
                text_config=LlamaConfig(**text),
                seg_config=M3DSegConfig(encoder_config=M3DVisionConfig(cls_token=False)),
            )
        )
    shapes = {theirs: model.state_dict()[ours].shape for ours, theirs in to_lamed(model.state_dict()).items()}
    return write(folder, shapes, shards, stored)


def write(folder: Path, shapes: dict[str, torch.Size], shards: int, stored: torch.dtype) -> int:
    """Random weights of these names in files of about the same size, with their index."""
    total = sum(shape.numel() for shape in shapes.values()) * stored.itemsize
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled >= total / shards and len(groups) < shards:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += shape.numel() * stored.itemsize
    index: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        state = {name: torch.empty(shapes[name], dtype=stored).normal_(std=0.02) for name in names}
        save_file(state, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}), encoding="utf-8")
    return total


def measured(source: Path, target: Path, dtype: torch.dtype | None, curve: bool) -> dict[str, Any]:
    """Convert in a process of its own; what that took."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_convert, args=(source, target, dtype, theirs))
    process.start()
    found: dict[str, Any] = ours.recv()
    process.join()
    if not curve:
        found.pop("curve")
    return found


def _convert(source: Path, target: Path, dtype: torch.dtype | None, out: Any) -> None:
    torch.set_num_threads(1)
    rows: list[tuple[float, int, int]] = []
    began, stop = time.monotonic(), threading.Event()
    before = _memory()

    def watch() -> None:
        while not stop.wait(0.05):
            rows.append((time.monotonic() - began, *_memory()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = convert(source, target, Options(dtype=dtype), say=lambda text: print(f"  {text}", flush=True))
    stop.set()
    watcher.join()
    every = max(1, len(rows) // 200)
    out.send(
        {
            "seconds": round(time.monotonic() - began, 1),
            "before": before[0],
            "peak_rss": _status("VmHWM"),  # the kernel's own record of the highest
            "peak_anonymous": max(row[2] for row in rows),
            "files_written": len(done.manifest["files"]),
            "bytes_written": done.manifest["bytes"],
            "loaded_whole": done.loaded,
            "curve": {
                "seconds": [round(row[0], 2) for row in rows[::every]],
                "rss": [row[1] for row in rows[::every]],
                "anonymous": [row[2] for row in rows[::every]],
            },
        }
    )


def _memory() -> tuple[int, int]:
    """Bytes of this process in memory, and of those that no file backs."""
    return _status("VmRSS"), _status("RssAnon")


def _status(name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields[name].split()[0]) * 1024


def main() -> None:
    """Make, convert, measure, take away."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", type=Path, default=None, help="where the folders are made (default: the system's)")
    parser.add_argument("--shards", type=int, nargs="+", default=[2, 4, 8], help="files of a released folder")
    parser.add_argument("--layers", type=int, default=32, help="of the language model (32 as released)")
    parser.add_argument("--stored", choices=DTYPES, default="bfloat16", help="of the weights in the released folder")
    parser.add_argument("--dtype", choices=("keep", *DTYPES), default="keep", help="of those that are written")
    given = parser.parse_args()
    rows = []
    for shards in given.shards:
        with tempfile.TemporaryDirectory(dir=given.room) as room:
            source = Path(room) / "M3D-LaMed-Llama-2-7B"
            size = make(source, layers=given.layers, shards=shards, stored=DTYPES[given.stored])
            print(f"{shards} files, {size / 1e9:.2f} GB", flush=True)
            row = measured(source, Path(room) / "ours", DTYPES.get(given.dtype), curve=shards == given.shards[-1])
            rows.append({"shards": shards, "bytes_read": size, **row})
            print({name: one for name, one in rows[-1].items() if name != "curve"}, flush=True)
            shutil.rmtree(source)
    result = {
        "command": f"python benchmarks/convert_memory.py --shards {' '.join(map(str, given.shards))} "
        f"--layers {given.layers} --stored {given.stored} --dtype {given.dtype}",
        "layers": given.layers,
        "stored": given.stored,
        "dtype": given.dtype,
        "largest_shard": 1_000_000_000,
        "runs": rows,
    }
    name = "convert_memory.json" if given.stored == "bfloat16" else f"convert_memory_{given.stored}.json"
    with atomic_path(HOME / "benchmarks" / "results" / name) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
