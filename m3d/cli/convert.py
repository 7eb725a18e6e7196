"""`m3d convert SRC DST`: released checkpoints of M3D-LaMed, M3D-CLIP and SegVol become folders of ours."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3d.cli.common import note, say, say_json, working

if TYPE_CHECKING:
    from m3d.convert.layouts import Options
    from m3d.convert.report import KeyReport

DESCRIPTION = """\
Convert a released checkpoint of M3D-LaMed, M3D-CLIP or SegVol into a folder that m3d reads.

It recognises what SRC is by the names in it, says what becomes of each, and stops if one is missing, left over or of
another shape. No code of SRC is run. A run that was stopped goes on from its last whole file."""
EPILOG = """\
examples:
  m3d convert GoodBaiBai88/M3D-LaMed-Llama-2-7B lamed --dtype bfloat16     fetched at a pinned commit (28 GB)
  m3d convert downloads/M3D-LaMed-Phi-3-4B lamed-phi3
  m3d convert downloads/M3D-CLIP m3d-clip --for m3d-data                   for retrieval on stores of M3D-Data
  m3d convert downloads/M3D-CLIP/pretrained_ViT.bin vit                    init.vision_tower=vit
  m3d convert runs/stage1/mm_projector.bin perceiver                       init.perceiver=perceiver
  m3d convert downloads/SegVol segvol                                      init.segvol=segvol
  m3d convert runs/stage2/model_with_lora.bin lamed --beside downloads/M3D-LaMed-Llama-2-7B
  m3d convert downloads/M3D-LaMed-Phi-3-4B --dry-run                       the key report alone

`--for scans` (the default) prepares whatever scan you show the model: min-max, cropped to the body, turned to SPL (the
released data keeps no orientation: this one is ours). `--for m3d-data` leaves M3D-Data's volumes as they are; stores of
configs/data/m3d.yaml need it. A sentencepiece tokenizer needs: pip install 'm3d-lamed[convert]'.
"""
DTYPES = ("keep", "float32", "bfloat16", "float16")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.set_defaults(usage_error=parser.error, offline=os.environ.get("HF_HUB_OFFLINE"))
    parser.add_argument("source", metavar="SRC", help="a folder, a .safetensors/.bin/.pth/.ckpt file, or OWNER/NAME")
    parser.add_argument("folder", metavar="DST", type=Path, nargs="?", help="the folder to write; --out is the same")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the weights written (default: as they are)")
    parser.add_argument(
        "--for", choices=("scans", "m3d-data"), default="scans", dest="preparation", help="see below (default: scans)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what SRC is and what becomes of its names")
    parser.add_argument("--load", action="store_true", help="load the result whole, even where it is large")
    parser.add_argument("--shard", type=float, metavar="GB", default=1.0, help="largest file, and memory (default: 1)")
    group = parser.add_argument_group("what files do not say")
    group.add_argument("--beside", type=Path, metavar="DIR", help="config.json and tokenizer are there, not beside SRC")
    group.add_argument(
        "--lora", choices=("merge", "keep"), default="merge", help="fold LoRA in, or keep it apart to go on training"
    )
    group.add_argument("--lora-alpha", type=int, metavar="N", default=32, help="as it was trained (released: 32)")
    group.add_argument("--vision-heads", type=int, metavar="N", help="of towers whose heads are not 64 wide")
    group.add_argument("--text-heads", type=int, metavar="N", help="of a text tower whose heads are not 64 wide")


def run(arguments: argparse.Namespace) -> int:
    """Convert."""
    target = arguments.folder or arguments.out
    if target is None and not arguments.dry_run:
        arguments.usage_error("name the folder to write: m3d convert SRC DST")
    if arguments.shard <= 0:
        arguments.usage_error("--shard must be more than 0")
    source, origin = _source(arguments)
    from m3d.convert.run import convert, examine

    options = _options(arguments)
    if arguments.dry_run:
        found = examine(source, options)
        _tell(arguments, found.layout.kind, found.report, found.layout.notes)
        found.report.refuse(arguments.source)
        return 0
    assert target is not None
    with working(f"converting {source.name}"):
        done = convert(
            source,
            target,
            options,
            force=arguments.force,
            load=arguments.load,
            largest_shard=int(arguments.shard * 1e9),
            origin=origin,
            say=note,
        )
    checked = "loaded whole" if done.loaded else "read back tensor by tensor, not loaded whole (--load does)"
    facts = {"folder": str(done.folder), "use": done.use, "checked": checked, "dtype": done.manifest["dtype"]}
    _tell(arguments, done.kind, done.report, done.notes, **facts, bytes=done.manifest["bytes"])
    return 0


def _source(arguments: argparse.Namespace) -> tuple[Path, dict[str, str]]:
    """Where the files are, fetched where a repository is named; and what the manifest says of it."""
    from m3d.convert.hub import RELEASES, fetch, release_of

    release = release_of(arguments.source)
    if release is None:
        if not Path(arguments.source).exists():
            raise FileNotFoundError(
                f"{arguments.source}: no such file or folder; repositories are {', '.join(RELEASES)}, or any as "
                "OWNER/NAME@COMMIT"
            )
        return Path(arguments.source), {}
    if arguments.offline is None:  # `main` keeps huggingface_hub offline for all commands
        os.environ.pop("HF_HUB_OFFLINE", None)
    with working(f"fetching {release.repo}"):
        return fetch(release), {"repo": release.repo, "revision": release.revision}


def _options(arguments: argparse.Namespace) -> Options:
    import torch

    from m3d.convert.layouts import Options

    return Options(
        dtype=None if arguments.dtype == "keep" else getattr(torch, arguments.dtype),
        preparation=arguments.preparation,
        beside=arguments.beside,
        lora=arguments.lora,
        lora_alpha=arguments.lora_alpha,
        vision_heads=arguments.vision_heads,
        text_heads=arguments.text_heads,
    )


def _tell(
    arguments: argparse.Namespace,
    kind: str,
    report: KeyReport,
    notes: tuple[str, ...],
    **facts: Any,  # noqa: ANN401 - for JSON
) -> None:
    if arguments.json:
        say_json({"kind": kind, **facts, "keys": report.to_dict(), "notes": list(notes)})
        return
    say(f"{Path(arguments.source).name}: {kind}")
    for line in report.lines():
        say(f"  {line}")
    for one in notes:
        note(f"note: {one}")
    if facts:
        say(f"{facts['folder']}: {facts['bytes'] / 1e9:.2f} GB in {facts['dtype']}, {facts['checked']}; {facts['use']}")
