"""A folder of another program's, written whole or not at all, and marked so that a later export may replace it."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import m3d
from data_prep.atomic import files_in, refuse_overwrite
from m3d.models.weights import READABLE
from m3d.recipes.checkpoints import fingerprint
from m3d.train.checkpoints import replacing

MARKER, SCHEMA = "m3d_export.json", "m3d.export/1"
INDEX = "model.safetensors.index.json"
Written = dict[str, tuple[int, ...]]
"""Names and shapes of the tensors of a folder."""


@contextmanager
def whole_folder(folder: Path, *, force: bool) -> Iterator[Path]:
    """An empty folder that takes the place of ``folder`` when all is written.

    Raises:
        FileExistsError: Something is there, and ``force`` is not given.
        ValueError: With ``force``: what is there is no earlier export, or holds other files too, which would be lost.
        OSError: The disk is full; nothing is left behind.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    _refuse(folder, force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(folder) as partial:
            yield partial
            if (partial / MARKER).is_file():
                written = {"files": sorted(files_in(partial) - {MARKER})}
                write_json(partial / MARKER, json.loads((partial / MARKER).read_text(encoding="utf-8")) | written)
            _refuse(folder, force)  # somebody may have put something there meanwhile
    except SafetensorError as error:  # which it raises on a full disk, too
        free = shutil.disk_usage(folder.parent).free
        what = f"could not be written ({error}; {free:,} bytes are free); nothing was kept"
        raise OSError(errno.EIO, what, str(folder)) from error


def _refuse(folder: Path, force: bool) -> None:
    refuse_overwrite(folder, force)
    if not folder.exists():
        return
    try:
        own = {MARKER, *json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder} is no earlier export (it has no {MARKER} of ours) and is not replaced; name another folder"
        ) from None
    if others := sorted(files_in(folder) - own):
        raise ValueError(
            f"{folder} holds {len(others)} files that no export wrote, such as {others[0]}; move them, or name another"
        )


def without_paths(path: Path) -> bytes:
    """``config.json`` without the folders of the machine that it was trained on."""
    fields = json.loads(path.read_text(encoding="utf-8"))

    def clean(value: Any) -> Any:  # noqa: ANN401 - any JSON
        if isinstance(value, dict):
            return {key: clean(one) for key, one in value.items() if key != "_name_or_path"}
        return [clean(one) for one in value] if isinstance(value, list) else value

    return (json.dumps(clean(fields), indent=2, ensure_ascii=False) + "\n").encode()


def mark(folder: Path, source: Path, kind: str, **facts: Any) -> None:  # noqa: ANN401 - whatever JSON holds
    """Say in a folder what it is and what it was made of."""
    what = {"schema": SCHEMA, "format": kind, "of": source.name, "sha256": fingerprint(source), "by": m3d.__version__}
    write_json(folder / MARKER, what | facts)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that a person can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def weight_names(folder: Path) -> dict[str, Path]:
    """The name of every tensor of a folder and the file that holds it.

    Raises:
        ValueError: A file is broken, or a tensor is in two.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                own = list(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); was the copy cut? Fetch it again") from None
        if twice := found.keys() & set(own):
            raise ValueError(f"{path}: {min(twice)} is in {found[min(twice)].name} already")
        found |= dict.fromkeys(own, path)
    return found


def stream_weights(
    source: Path,
    target: Path,
    names: Mapping[str, str],
    *,
    more: Mapping[str, Tensor] | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
) -> Written:
    """Write the named tensors of a folder under their new names, one file at a time; name and shape of all written.

    Types and bits stay, but for what ``change`` does to them. ``more`` goes into the last file.
    """
    by_file: dict[Path, list[str]] = {}
    for name, path in weight_names(source).items():
        if name in names:
            by_file.setdefault(path, []).append(name)
    written: Written = {}
    map_of: dict[str, str] = {}
    size = 0
    for path, own in by_file.items():
        with safe_open(path, framework="pt") as file:
            state = {names[name]: change(name, file.get_tensor(name)).contiguous() for name in own}
        if path == list(by_file)[-1]:
            state |= dict(more or {})
        file_name = path.name if len(by_file) > 1 else "model.safetensors"
        save_file(state, target / file_name, metadata={"format": "pt"})
        (target / file_name).chmod(READABLE)
        map_of |= dict.fromkeys(state, file_name)
        written |= {name: tuple(one.shape) for name, one in state.items()}
        size += sum(one.numel() * one.element_size() for one in state.values())
    if len(by_file) > 1:
        write_json(target / INDEX, {"metadata": {"total_size": size}, "weight_map": map_of})
    return written


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of the named files that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
