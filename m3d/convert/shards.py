"""Weights from file to file in the memory of one shard; what is finished stays finished when a run is stopped.

Shards gather in a hidden folder beside the target, with a journal of those that are whole. The next run of the same
conversion keeps them after checking their hashes.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data_prep.atomic import atomic_path
from m3d.convert.layouts import Folded
from m3d.convert.source import Source
from m3d.models.fold import State
from m3d.models.weights import READABLE

JOURNAL = "journal.json"
LARGEST_SHARD = 1_000_000_000
SPARE = 64_000_000
SAMPLE = 1_000_000
"""Bytes for everything that is not weights."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which tensors go into which file, by the published name; ``size`` are the bytes of each file."""

    source: Source
    files: Mapping[str, Sequence[str]]
    names: Mapping[str, str]
    sizes: Mapping[str, int]
    dtype: torch.dtype | None
    folded: Mapping[str, Folded] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """What must be the same for shards of an earlier run to be of use."""
        files = [(str(file.resolve()), file.stat().st_mtime_ns, _sample(file)) for file in self.source.files]
        folded = {name: asdict(pair) for name, pair in self.folded.items()}
        said = [files, {name: list(own) for name, own in self.files.items()}, dict(self.names), str(self.dtype), folded]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def make_plan(
    source: Source,
    places: Mapping[str, str],
    *,
    dtype: torch.dtype | None,
    folded: Mapping[str, Folded],
    largest: int = LARGEST_SHARD,
) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """Share tensors out over files of at most ``largest`` bytes, in the order in which they are read.

    ``places`` are new names by published ones, as `Layout` has them. The second result are the index files, by name.
    """
    groups: dict[str, dict[str, str]] = {}
    for published, ours in places.items():
        stem, _, name = ours.rpartition(":")
        groups.setdefault(stem or "model", {})[name] = published
    files: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    names: dict[str, str] = {}
    indexes: dict[str, dict[str, Any]] = {}
    for stem, own in groups.items():
        empty = {name: _empty(source, published, dtype) for name, published in own.items()}
        split = split_torch_state_dict_into_shards(
            empty, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=largest
        )
        for file, inside in split.filename_to_tensors.items():
            files[file] = [own[name] for name in inside]
            sizes[file] = sum(empty[name].nbytes for name in inside)
            names |= {own[name]: name for name in inside}
        if split.is_sharded:
            weight_map = {name: Path(file).name for name, file in split.tensor_to_filename.items()}
            indexes[f"{stem}.safetensors.index.json"] = {"metadata": split.metadata, "weight_map": weight_map}
    return Plan(source=source, files=files, names=names, sizes=sizes, dtype=dtype, folded=folded), indexes


def _sample(path: Path) -> str:
    """SHA-256 of a file's size and of its first and last megabyte."""
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(SAMPLE))
        file.seek(max(0, size - SAMPLE))
        digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _empty(source: Source, name: str, dtype: torch.dtype | None) -> Tensor:
    entry = source.entries[name]
    return torch.empty(entry.shape, dtype=_kept(entry.dtype, dtype), device="meta")


def _kept(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


def room_for(target: Path) -> Path:
    """The hidden folder beside ``target`` where its shards gather."""
    return target.parent / f".{target.name}.converting"


def begin(plan: Plan, room: Path) -> dict[str, str]:
    """The finished shards of an earlier run of the same conversion, by hash; the room is made, or cleared of others.

    Raises:
        OSError: The disk has no room for the rest.
    """
    done: dict[str, str] = {}
    journal = room / JOURNAL
    if journal.is_file():
        known = json.loads(journal.read_text(encoding="utf-8"))
        done = known["done"] if known["plan"] == plan.fingerprint else {}
    done = {name: sha for name, sha in done.items() if (room / name).is_file() and sha256_of(room / name) == sha}
    room.mkdir(parents=True, exist_ok=True)
    for path in sorted(room.rglob("*"), reverse=True):  # what was written beside the shards is written anew
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(room).as_posix() not in done:
            path.unlink()
    needed = sum(size for name, size in plan.sizes.items() if name not in done) + SPARE
    free = shutil.disk_usage(room).free
    if needed > free:
        if not done:
            room.rmdir()
        raise OSError(
            errno.ENOSPC, f"needs {needed:,} bytes of disk, {free:,} are free; make room or choose another", str(room)
        )
    _note(plan, room, done)
    return done


def write_shards(plan: Plan, room: Path, done: dict[str, str], say: Say) -> dict[str, str]:
    """Write what is not done yet; the SHA-256 of every file.

    Raises:
        OSError: The disk is full; what was finished is kept for the next run.
    """
    for number, (name, published) in enumerate(plan.files.items(), start=1):
        if name in done:
            say(f"{number} of {len(plan.files)}: {name} was finished before")
            continue
        _write(plan, room / name, published)
        done[name] = sha256_of(room / name)
        _note(plan, room, done)
        say(f"{number} of {len(plan.files)}: {name}, {plan.sizes[name] / 1e6:,.0f} MB")
    return {name: done[name] for name in plan.files}


def _write(plan: Plan, path: Path, published: Sequence[str]) -> None:
    state = dict(_converted(plan, published))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    try:
        save_file(state, partial, metadata={"format": "pt"})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(READABLE)
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        free = shutil.disk_usage(path.parent).free
        what = f"could not be written ({error}; {free:,} bytes are free); run it again to go on from the last file"
        raise OSError(getattr(error, "errno", None) or errno.EIO, what, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def _converted(plan: Plan, published: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in plan.source.read(list(published)):
        if name in plan.folded:
            tensor = _with_pair(plan.source, tensor, plan.folded[name])
        tensor = tensor.to(_kept(tensor.dtype, plan.dtype)).contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:  # a view of one buffer for all, as DeepSpeed saves them
            tensor = tensor.clone()
        yield plan.names[name], tensor


def _with_pair(source: Source, weight: Tensor, pair: Folded) -> Tensor:
    halves: State = dict(source.read([pair.down, pair.up]))
    added = pair.scaling * (halves[pair.up].float() @ halves[pair.down].float())
    return (weight.float() + added).to(weight.dtype)


def _note(plan: Plan, room: Path, done: Mapping[str, str]) -> None:
    with atomic_path(room / JOURNAL) as temporary:
        temporary.write_text(json.dumps({"plan": plan.fingerprint, "done": dict(done)}, indent=1), encoding="utf-8")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
