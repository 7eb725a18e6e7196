"""What a checkpoint folder is and where the bundled ones are; nothing here imports torch."""

import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from m3d.convert.hub import fetched, release_of

NEEDED = ("config.json", "preprocess.json", "tokenizer.json")
HEAD = "m3d_segvol"
"""The ``model_type`` of a mask head without a language model."""
SAMPLE = 1 << 20


def bundled() -> list[str]:
    """The models that ship in the package."""
    root = resources.files("m3d") / "bundled"
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []


def resolve(name_or_path: str | Path) -> Path:
    """The folder of a bundled model's name, of a path, or of a repository's name, checked to be an M3D checkpoint.

    A released model's repository (`m3d.convert.hub.RELEASES`), or any as ``OWNER/NAME@COMMIT``, is fetched and
    converted once, into the cache.

    Raises:
        FileNotFoundError: No such model or folder, a file of it is missing, or a repository is not to be had.
        ValueError: The folder holds a checkpoint of another architecture.
    """
    if str(name_or_path) in bundled():
        folder = Path(str(resources.files("m3d") / "bundled" / str(name_or_path)))
    elif (release := release_of(name_or_path)) is not None:
        folder = fetched(release)
    else:
        folder = Path(name_or_path)
    if not folder.is_dir():
        known = ", ".join(bundled()) or "none"
        raise FileNotFoundError(f"no model {str(name_or_path)!r}: neither a checkpoint folder nor bundled ({known})")
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"  # the output of a stage of training
    kind = kind_of(folder)
    if kind not in (None, "m3d", HEAD):
        raise ValueError(f"{folder} holds a {kind!r} model; an 'm3d' checkpoint is needed")
    if (folder / "parts.safetensors").is_file():
        raise ValueError(f"{folder} left out its language model; `m3d train` with stage merge makes a whole checkpoint")
    needed = NEEDED[:2] if kind == HEAD else NEEDED  # without a language model no tokenizer is needed
    missing = [name for name in needed if not (folder / name).is_file()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise FileNotFoundError(f"{folder} is not a whole M3D checkpoint: {', '.join(missing)} missing")
    return folder


def kind_of(folder: Path) -> str | None:
    """The ``model_type`` of a folder's config; None where it has no config."""
    config = folder / "config.json"
    kind: str | None = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    return kind


def sampled_weights(folder: Path) -> Iterator[bytes]:
    """What tells weights from others: names and sizes of their files, headers, first and last megabyte.

    Whole weights of a large model take minutes to read; two trainings differ in every megabyte.
    """
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        yield f"{path.name} {size}".encode()
        with path.open("rb") as file:
            yield file.read(SAMPLE)
            file.seek(max(0, size - SAMPLE))
            yield file.read(SAMPLE)


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the `sampled_weights` of a checkpoint folder."""
    digest = hashlib.sha256()
    for sample in sampled_weights(folder):
        digest.update(sample)
    return digest.hexdigest()
