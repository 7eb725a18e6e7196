"""Whether a converted folder is what it should be: read back from disk tensor by tensor, and loaded if it is small."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from m3d.convert.report import Shape
from m3d.models import M3DForConditionalGeneration, M3DProcessor
from m3d.models.clip import load_pair, vision_tower_of
from m3d.models.modeling import build_vision_tower
from m3d.models.name_tower import NameTower
from m3d.models.segvol import load_segvol
from m3d.models.weights import put, read_weights

SMALL = 2_000_000_000
"""Bytes of weights that are loaded whole without being asked to."""


def read_back(room: Path, expected: Mapping[str, Shape], files: Mapping[str, str]) -> None:
    """Read every tensor from disk once more, in the memory of the largest one.

    Raises:
        ValueError: A name or shape is not that of the model, or a tensor holds NaN or infinity.
    """
    seen: set[str] = set()
    for file in files:
        stem = _stem(file)
        for name, tensor in _tensors(room / file):
            ours = name if stem == "model" else f"{stem}:{name}"
            if expected.get(ours) != tuple(tensor.shape) or ours in seen:
                raise ValueError(f"{file}: {name} {tuple(tensor.shape)} is not what config.json describes")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float().sum())):
                _refuse_broken(file, name, tensor)
            seen.add(ours)
    if lost := expected.keys() - seen:
        raise ValueError(f"{room.name}: {len(lost)} tensors were not written, such as {min(lost)}")


def _refuse_broken(file: str, name: str, tensor: Tensor) -> None:
    """A sum overflows before its parts do, so they are looked at one by one."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{file}: {name} holds NaN or infinity, as published or through --dtype; take bfloat16 or keep"
        )


def _stem(file: str) -> str:
    folder, _, name = file.rpartition("/")
    stem = name.removesuffix(".safetensors").partition("-0")[0]
    return f"{folder}/{stem}" if folder else stem


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


def load_whole(kind: str, folder: Path, *, kept: bool) -> None:
    """Load a converted folder as whoever uses it does.

    Raises:
        ValueError: Something is missing, left over or of another shape.
    """
    if not kept:  # LoRA beside a language model is read by the recipes, in a room above this one
        LOADERS[kind](folder)


def _load_lamed(folder: Path) -> None:
    loaded: Any = M3DForConditionalGeneration.from_pretrained(
        folder, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    info = loaded[1]
    wrong = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise ValueError(f"{folder.name}: {len(wrong)} tensors do not load, such as {wrong[0]}")
    M3DProcessor.from_pretrained(folder)


def _load_vision(folder: Path) -> None:
    config, state = vision_tower_of(folder)
    put(build_vision_tower(config), state, folder.name)


def _load_segvol(folder: Path) -> None:
    load_segvol(folder)
    NameTower.read(folder)


LOADERS: dict[str, Callable[[Path], object]] = {
    "lamed": _load_lamed,
    "m3d-clip": load_pair,
    "vision": _load_vision,
    "segvol": _load_segvol,
    "perceiver": read_weights,
}
