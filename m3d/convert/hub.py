"""Released models by their names on the Hugging Face hub: fetched at a pinned revision, converted once into the cache.

Only weights, configs and word lists are fetched, never code. Nothing here imports torch until something is converted.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

__all__ = ["RELEASES", "Release", "cache_dir", "fetch", "fetched", "release_of"]

NAMED = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[0-9a-f]{40}))?$")
WORDS = ("special_tokens_map.json", "tokenizer_config.json")
SENTENCES = ("added_tokens.json", "tokenizer.model", *WORDS)
ANY = (
    *("*.json", "*.safetensors", "tokenizer.model", "vocab.txt", "merges.txt"),
    *("pytorch_model*.bin", "preprocess.json", "recipe.yaml"),
)
"""What is fetched of a repository that we do not know."""


@dataclass(frozen=True)
class Release:
    """A repository at one of its commits, and the files of it that are needed."""

    repo: str
    revision: str
    files: tuple[str, ...]

    @property
    def slug(self) -> str:
        """Its name as a folder's."""
        return f"{self.repo.replace('/', '--')}@{self.revision[:12]}"


def _shards(number: int) -> tuple[str, ...]:
    names = (f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1))
    return ("config.json", "generation_config.json", "model.safetensors.index.json", *names)


RELEASES = {
    one.repo: one
    for one in (
        Release(
            "GoodBaiBai88/M3D-LaMed-Llama-2-7B",
            "badc2cf855e9cc081d04c986b9995947dcea67b4",  # the last upload of weights
            (*_shards(6), *SENTENCES),
        ),
        Release(
            "GoodBaiBai88/M3D-LaMed-Phi-3-4B",
            "7252e078d83a0fba562d075a52cd537cc682dc69",  # what came later is the same weights in one pickle
            (*_shards(4), *SENTENCES),
        ),
        Release(
            "GoodBaiBai88/M3D-CLIP",
            "74931a82547b9b52650d9704706e525dc450b0d5",
            ("config.json", "model.safetensors", "vocab.txt", *WORDS),
        ),
        Release(
            "BAAI/SegVol",
            "516701d5bef430604a13f5db7ce896149d075663",
            ("config.json", "pytorch_model.bin", "tokenizer.json", "vocab.json", "merges.txt", *WORDS),
        ),
    )
}
"""The released models, each at the commit whose files we know."""


def cache_dir() -> Path:
    """Where downloads and what is made of them are kept: ``$XDG_CACHE_HOME/m3d``, else ``~/.cache/m3d``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "m3d"


def release_of(name: str | Path) -> Release | None:
    """The repository that a name means: a known one, or any as ``OWNER/NAME@COMMIT``; None where it means none."""
    found = NAMED.match(str(name))
    if found is None or Path(name).exists():
        return None
    known, revision = RELEASES.get(found["repo"]), found["revision"]
    if revision is None:
        return known
    return Release(found["repo"], revision, known.files if known is not None else ANY)


def placed(release: Release) -> Path:
    """Where somebody without a network puts a release's files."""
    return cache_dir() / "released" / release.slug


def fetch(release: Release) -> Path:
    """The folder with a release's files: as it was placed, as it is in the hub's cache, or downloaded now.

    Raises:
        FileNotFoundError: It is nowhere, and cannot be downloaded; the message says which files to place where.
    """
    folder = placed(release)
    wanted = [name for name in release.files if "*" not in name]
    if folder.is_dir() and not [name for name in wanted if not (folder / name).is_file()]:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        patterns = [*release.files, "tokenizer.json"]
        return Path(snapshot_download(release.repo, revision=release.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        lost = [name for name in wanted if not (folder / name).is_file()]
        raise FileNotFoundError(
            f"{release.repo} is not here and could not be fetched ({_why(error)}). With a network: m3d convert "
            f"{release.repo} FOLDER. Without one, put into {folder} of its revision {release.revision[:12]}: "
            f"{', '.join(_in_short(lost)) or 'its weights, configs and tokenizer'}"
        ) from None


def _in_short(names: list[str]) -> list[str]:
    """Numbered shards in one word, as a shell writes them: ``model-0000{1..6}-of-00006.safetensors``."""
    shards = [name for name in names if "-of-" in name]
    if len(shards) < 2:
        return names
    stem, last = shards[0].split("-")[0], int(shards[-1].split("-")[1])
    short = f"{stem}-0000{{{int(shards[0].split('-')[1])}..{last}}}-{'-'.join(shards[0].split('-')[2:])}"
    return [*dict.fromkeys(short if name in shards else name for name in names)]


def _why(error: Exception) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set, as `m3d` does for commands that use a model"
    return str(error).splitlines()[0][:80] if str(error) else type(error).__name__


def fetched(release: Release) -> Path:
    """The checkpoint folder of ours that a release becomes: in the cache, or fetched and converted into it.

    Language models are written in bfloat16, in which they were trained; they are released in float32, twice as large.
    A repository that holds a checkpoint of ours is used as it is.

    Raises:
        FileNotFoundError: It is not there and cannot be fetched.
        ValueError: It is no model that we can convert.
    """
    target = cache_dir() / "converted" / release.slug
    if (target / "manifest.json").is_file():
        return target
    with _one_at_a_time(target):
        if (target / "manifest.json").is_file():  # another process has made it meanwhile
            return target
        source = fetch(release)
        if (source / "preprocess.json").is_file():
            return source
        import torch

        from m3d.convert.layouts import Options
        from m3d.convert.run import convert

        log.warning("converting %s once, into %s", release.repo, target)
        dtype = torch.bfloat16 if "LaMed" in release.repo else None
        origin = {"repo": release.repo, "revision": release.revision}
        return convert(source, target, Options(dtype=dtype), origin=origin).folder


@contextmanager
def _one_at_a_time(target: Path) -> Iterator[None]:
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(target.parent / f".{target.name}.lock"):
        yield
