"""Scans and their texts as unit vectors, kept in parts: a killed run goes on, and scoring needs no model.

::

    DIR/retrieval/about.json          of which records, and with what: all parts are of that
    DIR/retrieval/part-<hash>.npz     vectors of a few scans and of all their texts, whole or not there
"""

# n = records, B = scans of a part, E = width of the embedding

import hashlib
import json
import logging
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data_prep.atomic import atomic_path
from data_prep.preprocess import FILE_NAME, Preprocess
from data_prep.record import Media, Record
from data_prep.volume import BadScan
from m3d.models.clip import Pair, load_pair
from m3d.train.cases import TrainingCase
from m3d.train.pairs import PairCollator

log = logging.getLogger(__name__)

__all__ = ["Asked", "ClipEmbedder", "Embedded", "Embedder", "embed_records", "read_embedded", "weights_sha256"]

FOLDER, ABOUT, SCHEMA = "retrieval", "about.json", "m3d.retrieval/1"
UNREADABLE = "BadScan: its files cannot be read, see the log"  # results are shared, and errors name files
Asked = tuple[TrainingCase, Record]  # a scan, and one of its texts
Told = tuple[TrainingCase, list[Record]]  # a scan, and all that is asked of it
Vectors = npt.NDArray[np.float32]


class Embedder(Protocol):
    """What makes unit vectors of scans and of texts, in one space."""

    def about(self) -> dict[str, Any]:
        """What it is, so exactly that vectors of another are not taken for its own; plain JSON, no paths."""

    def check(self, cases: Sequence[TrainingCase]) -> None:
        """Raise ValueError where the scans are not prepared as it must see them."""

    def scans(self, volumes: Tensor, media: Sequence[Media]) -> Tensor:
        """``(B, D, H, W) -> (B, E)``: scans as stored, in [0, 1]."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to ``(B, E)``."""


@dataclass(frozen=True, eq=False)
class ClipEmbedder:
    """An M3D-CLIP pair, pooled as it was trained (the published one: class tokens)."""

    pair: Pair

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> "ClipEmbedder":
        """Read a folder of ``pretrain_clip``."""
        pair = load_pair(folder)
        pair.model.to(device)
        return cls(pair)

    def about(self) -> dict[str, Any]:
        """Weights, pooling and preprocess."""
        return {
            "kind": "M3D-CLIP",
            "weights_sha256": weights_sha256(self.pair.model),
            "pooling": {"volume": self.pair.config.volume_pooling, "text": self.pair.config.text_pooling},
            "preprocess": self.pair.preprocess.to_dict(),
        }

    def check(self, cases: Sequence[TrainingCase]) -> None:
        """The stores must have been prepared as the pair's own preprocess says."""
        for root in sorted({case.image.root for case in cases}):
            if (root / FILE_NAME).is_file() and Preprocess.read(root) != self.pair.preprocess:
                raise ValueError(f"{root} was prepared differently; compare its preprocess.json with the model's")
        for case in cases:
            if tuple(case.image.media.shape) != self.pair.preprocess.grid:
                raise ValueError(
                    f"{case.id} is stored as {case.image.media.shape}, the model sees {self.pair.preprocess.grid}; "
                    "prepare the store with the model's preprocess.json"
                )

    @torch.inference_mode()
    def scans(self, volumes: Tensor, media: Sequence[Media]) -> Tensor:
        """One unit vector a scan."""
        return self.pair.model.embed_volumes(volumes[:, None].to(self._device))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """One unit vector a text, cut where the tokenizer says."""
        words = PairCollator(self.pair.tokenizer).words(texts)
        given = (words[name].to(self._device) for name in ("input_ids", "attention_mask"))
        return self.pair.model.embed_texts(*given)

    @property
    def _device(self) -> torch.device:
        return self.pair.model.log_scale.device


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of all weights by name."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -- embedding ------------------------------------------------------------------------------------------------------


def embed_records(
    asked: Sequence[Asked], embedder: Embedder, out: Path, *, shard: tuple[int, int] = (0, 1), batch: int = 8
) -> None:
    """Embed the scans and the texts of records, ``batch`` scans at a time, as far as that is not done yet.

    A scan with several texts is looked at once. A ``shard`` (rank, world) takes every world-th of the scans. A scan
    that cannot be read is a failure of all its records, with a vector of NaN; its texts stay among the candidates.

    Raises:
        ValueError: There are fewer than two scans, the scans are not prepared for this model, a record is there twice
            or has no text, or the folder holds embeddings of other records or of another model.
    """
    told = _by_image(asked)
    if len(told) < 2:
        raise ValueError(f"{len(told)} scans have a text, of which anyone finds it; retrieval needs two or more")
    embedder.check([case for case, _ in told])
    folder = out / FOLDER
    _begin(folder, _facts(asked, embedder))
    done = {row["id"] for path in _parts(folder) for row in _rows(_load(path))}
    rank, world = shard
    own = [(case, records) for case, records in told[rank::world] if records[0].id not in done]
    for start in tqdm(range(0, len(own), batch), desc="retrieval", unit="part", disable=None):
        _write_part(folder, own[start : start + batch], embedder)


def _by_image(asked: Sequence[Asked]) -> list[Told]:
    found: dict[str, Told] = {}
    for case, record in asked:
        found.setdefault(case.id, (case, []))[1].append(record)
    return list(found.values())


def _facts(asked: Sequence[Asked], embedder: Embedder) -> dict[str, Any]:
    ids = [record.id for _, record in asked]
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise ValueError(f"the record {twice} is there twice; is a store given twice, or do two name images alike?")
    if mute := next((record for _, record in asked if record.target.text is None), None):
        raise ValueError(f"the record {mute.id} ({mute.task}) has no text that could be looked for; leave it out")
    texts = hashlib.sha256(json.dumps([(record.id, record.target.text) for _, record in asked]).encode()).hexdigest()
    voxels = hashlib.sha256(json.dumps([case.image.sha256 for case, _ in asked]).encode()).hexdigest()
    facts = {"schema": SCHEMA, "texts_sha256": texts, "images_sha256": voxels, "ids": ids}
    return facts | {"embedder": embedder.about()}


def _begin(folder: Path, facts: Mapping[str, Any]) -> None:
    """Note what the folder is of; the same again changes nothing."""
    path = folder / ABOUT
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(facts))
        if wrong := sorted(name for name in now.keys() | known.keys() if now.get(name) != known.get(name)):
            raise ValueError(f"{folder} holds embeddings of another run: {', '.join(wrong)} differ; choose another out")
        return
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(dict(facts), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _write_part(folder: Path, told: Sequence[Told], embedder: Embedder) -> None:
    began = time.perf_counter()
    failures: list[str | None] = []
    shown = []
    for case, _ in told:
        try:
            shown.append((len(failures), case.tensors()[0], case.image.media))
            failures.append(None)
        except (BadScan, OSError) as error:
            log.warning("%s cannot be read: %s", case.id, error)
            failures.append(UNREADABLE)
    owners = [number for number, (_, records) in enumerate(told) for _ in records]
    rows: list[dict[str, Any]] = [
        {"id": one.id, "image_id": one.image_id, "patient_id": one.patient_id, "text": one.target.text}
        for _, records in told
        for one in records
    ]
    words = embedder.texts([row["text"] for row in rows]).float().cpu().numpy()
    scans = np.full((len(told), words.shape[1]), np.nan, np.float32)
    if shown:
        places, images, media = zip(*shown, strict=True)
        scans[list(places)] = embedder.scans(torch.stack(images), media).float().cpu().numpy()
    scans = scans[owners]
    for row, owner, scan, text in zip(rows, owners, scans, words, strict=True):
        row["failure"] = failures[owner]
        if row["failure"] is None and not (np.isfinite(scan).all() and np.isfinite(text).all()):
            row["failure"] = "NotFinite: the embedding has values that are no numbers"
    named = hashlib.sha256(json.dumps([row["id"] for row in rows]).encode()).hexdigest()[:16]
    seconds = time.perf_counter() - began
    with atomic_path(folder / f"part-{named}.npz") as temporary:
        np.savez(temporary, scans=scans, words=words, rows=np.array(json.dumps(rows)), seconds=np.array(seconds))


# -- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Embedded:
    """Records as vectors: ``scans`` and ``words`` (n, E), NaN where one could not be made; all in order of ``ids``."""

    about: Mapping[str, Any]
    ids: tuple[str, ...]
    image_ids: tuple[str, ...]
    patients: tuple[str, ...]
    texts: tuple[str, ...]
    failures: tuple[str | None, ...]
    scans: Vectors
    words: Vectors
    seconds: float


def read_embedded(out: Path) -> Embedded:
    """All parts of a run together, in the order of the records' ids, however many processes made them.

    Raises:
        FileNotFoundError: Nothing was embedded here.
        ValueError: Not all of it was, or a part is broken.
    """
    folder = out / FOLDER
    if not (folder / ABOUT).is_file():
        raise FileNotFoundError(f"{folder / ABOUT} is missing: nothing was embedded here; run retrieval first")
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    found: dict[str, tuple[Mapping[str, Any], Vectors, Vectors]] = {}
    seconds = 0.0
    for path in _parts(folder):
        part = _load(path)
        seconds += float(part["seconds"])
        for row, scan, text in zip(_rows(part), part["scans"], part["words"], strict=True):
            found.setdefault(row["id"], (row, scan, text))
    if missing := len(about["ids"]) - len(found):
        what = f"{missing} of {len(about['ids'])} records are not embedded yet"
        raise ValueError(f"{folder}: {what}; run the same again, to its end")
    rows, scans, words = zip(*(found[one] for one in sorted(found)), strict=True)
    columns = {name: tuple(row[of] for row in rows) for name, of in _COLUMNS.items()}
    return Embedded(about=about, scans=np.stack(scans), words=np.stack(words), seconds=seconds, **columns)


_COLUMNS = {"ids": "id", "image_ids": "image_id", "patients": "patient_id", "texts": "text", "failures": "failure"}


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.npz"))


def _load(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as part:
            return dict(part)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it and run the same again") from error


def _rows(part: Mapping[str, npt.NDArray[Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(str(part["rows"]))
    return rows
