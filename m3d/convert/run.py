"""From a released checkpoint to a folder of ours, whole or not at all: look, compare, write, read back, hand over."""

import errno
import json
import logging
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data_prep.atomic import files_in, refuse_overwrite
from m3d.convert.lamed import folded_in, lamed_layout
from m3d.convert.layouts import (
    Layout,
    Options,
    clip_layout,
    kind_of,
    perceiver_layout,
    segvol_layout,
    vision_layout,
)
from m3d.convert.report import KeyReport, compare
from m3d.convert.shards import JOURNAL, LARGEST_SHARD, Say, begin, make_plan, room_for, sha256_of, write_shards
from m3d.convert.source import Source, open_source
from m3d.convert.verify import SMALL, load_whole, read_back
from m3d.models.weights import READABLE

log = logging.getLogger(__name__)

__all__ = ["Converted", "convert", "examine"]

LAYOUTS = {
    "lamed": lamed_layout,
    "m3d-clip": clip_layout,
    "vision": vision_layout,
    "perceiver": perceiver_layout,
    "segvol": segvol_layout,
}
USES = {
    "lamed": "m3d.load reads it",
    "m3d-clip": "`m3d bench run --clip` and init.vision_tower take it",
    "vision": "init.vision_tower takes it",
    "perceiver": "init.perceiver takes it",
    "segvol": "init.segvol takes it",
}
MANIFEST, FORMAT = "manifest.json", "m3d.checkpoint/1"
PACKAGES = ("torch", "transformers", "safetensors", "m3d-lamed")
UNUSED = "released/unused.safetensors"
"""What nothing calls is kept there by its released names, so that `m3d export` gives it back."""
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.position_ids)$")


@dataclass(frozen=True, kw_only=True)
class Examined:
    """A checkpoint, what it becomes, and how its names compare."""

    source: Source
    layout: Layout
    report: KeyReport

    @property
    def dtype(self) -> torch.dtype:
        """What most of its values are."""
        sizes: dict[torch.dtype, int] = {}
        for entry in self.source.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
        return max(sizes, key=sizes.__getitem__)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written, and whether it was loaded whole or only read back tensor by tensor."""

    folder: Path
    kind: str
    use: str
    report: KeyReport
    notes: tuple[str, ...]
    loaded: bool
    manifest: Mapping[str, Any]


def examine(path: Path, options: Options | None = None) -> Examined:
    """Look at a checkpoint without writing anything; its report may be of what does not fit.

    Raises:
        FileNotFoundError: There are no weights, no config or no tokenizer.
        ValueError: It is nothing that we know, or its files do not belong together.
    """
    source, options = open_source(path), options or Options()
    shapes = {name: entry.shape for name, entry in source.entries.items()}
    kind = kind_of(shapes, path)
    try:
        layout = LAYOUTS[kind](source, shapes, options)
    except KeyError as error:
        raise ValueError(f"{path} looks like {kind}, but {error} is missing: fetch all its weight files") from None
    return Examined(source=source, layout=layout, report=compare(layout.published, layout.new_name, layout.expected))


def convert(
    path: Path,
    target: Path,
    options: Options | None = None,
    *,
    force: bool = False,
    load: bool = False,
    largest_shard: int = LARGEST_SHARD,
    origin: Mapping[str, str] | None = None,
    say: Say = log.info,
) -> Converted:
    """Convert a released checkpoint into the folder ``target``.

    A run that was stopped goes on from its last whole shard. ``load`` loads the result whole even where it is large;
    ``origin`` is what the manifest says of where the files came from.

    Raises:
        FileNotFoundError, FileExistsError: Something is missing, or the target is there and ``force`` is not given.
        ValueError: The checkpoint is not one that we know, or not whole.
        OSError: The disk is full.
    """
    options = options or Options()
    _refuse_target(target, force)
    found = examine(path, options)
    found.report.refuse(str(path))
    dtype = options.dtype or found.dtype
    plan, indexes = make_plan(
        found.source, found.report.used, dtype=options.dtype, folded=found.layout.folded, largest=largest_shard
    )
    room = room_for(target)
    files = write_shards(plan, room, begin(plan, room), say)
    for name, index in indexes.items():
        (room / name).write_text(json.dumps(index, indent=1), encoding="utf-8")
    _keep_unused(found, room)
    found.layout.save(room, dtype)
    say("reading it back")
    size = sum(plan.sizes.values())
    whole = load or size <= SMALL
    try:
        read_back(room, found.layout.expected, files)
        if whole:
            load_whole(found.layout.kind, room, kept=any(name.startswith("parts") for name in files))
    except ValueError:
        shutil.rmtree(room)  # it would come out so again
        raise
    manifest = _manifest(found, target, files, str(dtype).removeprefix("torch."), size, origin or {})
    manifest["written"] = sorted({MANIFEST, *files_in(room)} - {JOURNAL})
    (room / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _refuse_target(target, force)  # somebody may have put something there meanwhile
    _hand_over(room, target)
    (target / JOURNAL).unlink()
    return Converted(
        folder=target,
        kind=found.layout.kind,
        use=USES[found.layout.kind],
        report=found.report,
        notes=found.layout.notes,
        loaded=whole,
        manifest=manifest,
    )


def _refuse_target(target: Path, force: bool) -> None:
    """Stop before the work; what is replaced must be a checkpoint, not somebody's other folder."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    refuse_overwrite(target, force)
    if not target.exists():
        return
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        own = set(manifest["written"]) if manifest["stage"] == "convert" else set()
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    if not own:
        raise ValueError(f"{target} is no earlier conversion (by its {MANIFEST}) and is not replaced; name another")
    if others := sorted(files_in(target) - own):
        raise ValueError(
            f"{target} holds {len(others)} files that no conversion wrote, such as {others[0]}; move them, or name "
            "another folder"
        )


def _keep_unused(found: Examined, room: Path) -> None:
    kept = [name for name in found.report.dead if not COMPUTED.search(name)]
    if not kept:
        return
    path = room / UNUSED
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in found.source.read(kept)}, path, metadata={"format": "pt"})
    path.chmod(READABLE)


def _manifest(
    found: Examined, target: Path, files: Mapping[str, str], dtype: str, size: int, origin: Mapping[str, str]
) -> dict[str, Any]:
    layout, source = found.layout, found.source
    versions = {name: metadata.version(name) for name in PACKAGES if _is_installed(name)}
    return {
        "format": FORMAT,
        "stage": "convert",
        "final": True,
        "name": target.name,
        "kind": layout.kind,
        "dtype": dtype,
        "bytes": size,
        "parameters": sum(torch.Size(shape).numel() for shape in layout.expected.values()),
        "keys": {**found.report.to_dict(), "folded_lora": len(list(folded_in(layout.folded)))},
        "source": {
            "name": source.path.name,
            **origin,
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in source.files},
        },
        "files": dict(files),
        "packages": {"python": platform.python_version(), **versions},
        "notes": list(layout.notes),
    }


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _hand_over(room: Path, target: Path) -> None:
    """Put the finished folder where it belongs; what was there goes only when it is."""
    old = target.parent / f".{target.name}.replaced"
    try:
        if target.exists():
            target.replace(old)
        room.replace(target)
    except OSError as error:
        what = f"could not be put in place ({error.strerror}); the finished files are in {room}"
        raise OSError(error.errno or errno.EIO, what, str(target)) from None
    shutil.rmtree(old, ignore_errors=True)
