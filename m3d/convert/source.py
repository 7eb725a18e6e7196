"""The tensors of a published checkpoint, one file at a time: what there is, and any of it when it is asked for.

Safetensors and torch's zip files are mapped, so a file of many gigabytes costs the memory of what is read from it.
Pickles are read with ``weights_only=True``; what needs more than tensors is refused.
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from m3d.models.fold import State

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin", "merged_model.bin", "model.bin", "model_with_lora.bin")
"""Of several files that each hold a whole model, the first that is there is read."""
INSIDE = ("model", "state_dict")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor is, and what."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint's files and, in the order in which they stand there, its tensors."""

    path: Path
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]

    @property
    def folder(self) -> Path:
        """Where its config and tokenizer would be."""
        return self.path if self.path.is_dir() else self.path.parent

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Some of its tensors, file by file; each is valid as long as it is held."""
        wanted = set(names)
        for file in self.files:
            own = [name for name, entry in self.entries.items() if entry.file == file and name in wanted]
            if own:
                yield from _tensors(file, own)


def open_source(path: Path) -> Source:
    """List the tensors of a file, or of a folder's weights.

    Raises:
        FileNotFoundError: There are no weights, or shards that the index names are missing.
        ValueError: A file is broken, holds more than tensors, or two files hold the same tensor.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    files = weight_files(path) if path.is_dir() else (path,)
    entries: dict[str, Entry] = {}
    for file in files:
        found = _entries(file)
        if twice := entries.keys() & found.keys():
            raise ValueError(f"{file}: {min(twice)} is in {entries[min(twice)].file.name} too; keep one of the files")
        entries |= found
    return Source(path, tuple(files), entries)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that hold its weights: those of its index, else the whole one, else the only one.

    Raises:
        FileNotFoundError: There are none, or a shard is missing.
        ValueError: There are several and nothing says which.
    """
    for name in INDEXES:
        if (folder / name).is_file():
            shards = sorted(set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [shard for shard in shards if not (folder / Path(shard).name).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{folder}: {len(missing)} of {len(shards)} weight files are missing: {', '.join(missing)}; "
                    f"download them to this folder"
                )
            return tuple(folder / Path(shard).name for shard in shards)
    for name in WHOLE:
        if (folder / name).is_file():
            return (folder / name,)
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{folder}: no weights ({', '.join(SUFFIXES)}); was the download complete?")
    if len(found) > 1:
        raise ValueError(f"{folder} has {', '.join(path.name for path in found)} and no index; name the file itself")
    return tuple(found)


def _entries(file: Path) -> dict[str, Entry]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}
                return {
                    name: Entry(file, tuple(one.get_shape()), DTYPES[one.get_dtype()]) for name, one in slices.items()
                }
        except (SafetensorError, KeyError) as error:
            raise _cut(file, error) from None
    return {name: Entry(file, tuple(one.shape), one.dtype) for name, one in _unpickled(file).items()}


def _tensors(file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            for name in names:
                yield name, opened.get_tensor(name)
        return
    state = _unpickled(file)
    for name in names:
        yield name, state[name]


def _unpickled(file: Path) -> State:
    """The state dict of a ``.bin``, ``.pth`` or ``.ckpt``, mapped where its format allows.

    Raises:
        ValueError: It is broken or holds more than tensors.
    """
    try:
        zipped = torch.serialization._is_zipfile(file.open("rb"))
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file} holds more than tensors, or is cut; pickles that could run code are not read. Fetch it again, or "
            "ask for the weights as safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise _cut(file, error) from None
    for name in INSIDE:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    state = {name: one for name, one in found.items() if isinstance(one, Tensor)} if isinstance(found, dict) else {}
    if not state:
        raise ValueError(f"{file} holds no named tensors; is it a checkpoint?")
    return state


def _cut(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} cannot be read ({str(error).splitlines()[0]}); was the download cut? Fetch it again")
