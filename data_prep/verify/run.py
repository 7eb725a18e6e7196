"""Verify a store or a file of records: read every line, then every image once, then compare images with each other.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from data_prep.terms import Terms, load_terms
from data_prep.verify.findings import CHECKS, Findings, Report
from data_prep.verify.folder import check_leftovers, check_rejects, num_refused
from data_prep.verify.gather import Gathered, Render, gather_index, gather_records
from data_prep.verify.images import ImageResult, check_image
from data_prep.verify.parts import FOLDER as PARTS
from data_prep.verify.parts import check_parts
from data_prep.verify.pool import spread
from data_prep.verify.twins import check_patients, check_reports, check_volumes

__all__ = ["Progress", "Settings", "verify"]

RECORDS, INDEX, REJECTS = "records.jsonl", "images.jsonl", "rejects.jsonl"
_SLOW = ("checksums", "values", "blank", "empty", "boxes")


class Progress(Protocol):
    """Passes items on and tells a person how far it is."""

    def __call__(self, items: Iterable[ImageResult], *, total: int, what: str) -> Iterable[ImageResult]:
        """Pass them on."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to verify: ``allow`` turns a check's errors into warnings, ``similar`` is the Jaccard index of reports."""

    limit: int = 100
    workers: int | None = None
    fast: bool = False
    similar: float = 0.8
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.limit < 1 or (self.workers is not None and self.workers < 1):
            raise ValueError(f"limit and workers must be 1 or more, got {self.limit} and {self.workers}")
        if not 0 < self.similar <= 1:
            raise ValueError(f"similar must lie between 0 and 1, got {self.similar:g}")
        for name in self.allow:
            if name not in CHECKS:
                raise ValueError(f"allow={name!r} is no check; known: {', '.join(CHECKS)}")


def verify(
    source: Path | str,
    *,
    root: Path | str | None = None,
    settings: Settings | None = None,
    render: Render | None = None,
    terms: Terms | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a store's folder, or a file of records whose media lie under ``root`` (its own folder by default).

    ``render`` tries to write a record's prompt and answer; ``terms`` are the class names known beside the images' own,
    our dictionary by default.

    Raises:
        FileNotFoundError: There are no records.
    """
    start, settings = time.monotonic(), settings or Settings()
    source = Path(source)
    is_store = source.is_dir()
    records = source / RECORDS if is_store else source
    if not records.is_file():
        raise FileNotFoundError(f"{records} is missing; run `m3d data prepare` to its end, or name a records.jsonl")
    folder = Path(root) if root is not None else records.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder; --root is the one that the paths of the media start from")
    findings, gathered = Findings(settings.limit, settings.allow), Gathered()
    gathered.vocabulary.terms = load_terms() if terms is None else terms
    if is_store:
        _read_index(source, gathered, findings)
    gather_records(records, gathered, findings, render=render)
    _check_content(records, gathered, findings, is_store)
    digests = _check_images(gathered, folder, findings, settings, progress)
    _check_together(gathered, digests, findings, settings)
    if is_store:
        _check_folder(source, gathered, findings)
    order = list(CHECKS)
    return Report(
        source=str(source),
        findings=tuple(sorted(findings.kept, key=lambda one: order.index(one.check))),
        counts=findings.counts,
        looked_at={"records": gathered.num_records + gathered.num_broken, "images": len(gathered.images)},
        skipped=_skipped(settings, gathered, render is not None, is_store),
        seconds=time.monotonic() - start,
    )


def _read_index(source: Path, gathered: Gathered, findings: Findings) -> None:
    for name in ("store.json", "preprocess.json", INDEX):
        if not (source / name).is_file():
            findings.error("files", name, "missing; run `m3d data prepare` to its end")
    if (source / INDEX).is_file():
        gathered.has_parts = (source / PARTS).is_dir()
        gather_index(source / INDEX, gathered, findings)


def _check_content(records: Path, gathered: Gathered, findings: Findings, is_store: bool) -> None:
    """A store that holds nothing is no store, however well-formed its files are."""
    if gathered.num_records + gathered.num_broken == 0:
        refused = num_refused(records.parent / REJECTS) if is_store and not gathered.images else 0
        why = f"holds no record: all {refused} scans were refused ({REJECTS})" if refused else "holds no record"
        findings.error("content", records.name, f"{why}; mend the source or the config, then prepare again")


def _check_images(
    gathered: Gathered, root: Path, findings: Findings, settings: Settings, progress: Progress | None
) -> dict[str, str | None]:
    check = partial(check_image, root=root, fast=settings.fast)
    results: Iterable[ImageResult] = spread(check, list(gathered.images.values()), settings.workers)
    if progress is not None:
        results = progress(results, total=len(gathered.images), what="images")
    digests = {}
    for image_id, result in zip(gathered.images, results, strict=True):
        digests[image_id] = result.digest
        for finding in result.findings:
            findings.add(finding)
    return digests


def _check_together(gathered: Gathered, digests: dict[str, str | None], findings: Findings, settings: Settings) -> None:
    for finding in check_patients(gathered.images):
        findings.add(finding)
    for finding in check_volumes(gathered.images, digests):
        findings.add(finding)
    for finding in check_reports(gathered.reports.values(), threshold=settings.similar):
        findings.add(finding)
    for finding in gathered.vocabulary.check_used(INDEX):
        findings.add(finding)


def _check_folder(source: Path, gathered: Gathered, findings: Findings) -> None:
    if gathered.has_parts:
        for finding in check_parts(source, gathered):
            findings.add(finding)
    if gathered.indexed:
        for image_id, facts in gathered.images.items():
            if image_id not in gathered.entries:
                findings.warn("index", facts.where, f"image {image_id!r} has no record; it will never be drawn")
    known = {path for facts in gathered.images.values() for path in (facts.media.path, *facts.mask_paths)}
    for finding in check_leftovers(source, known=known):
        findings.add(finding)
    for finding in check_rejects(source / REJECTS):
        findings.add(finding)


def _skipped(settings: Settings, gathered: Gathered, rendered: bool, is_store: bool) -> dict[str, str]:
    skipped = {check: "--fast reads no voxels" for check in _SLOW if settings.fast}
    if gathered.vocabulary.empty:
        skipped["names"] = "there is no images.jsonl and no dictionary to compare with"
    if not rendered:
        skipped["tasks"] = "names only; nothing was given that renders"
    if not is_store:
        skipped |= dict.fromkeys(("index", "parts", "checksums", "leftovers", "rejects"), "this is a file, not a store")
        return skipped
    if not gathered.has_parts:
        skipped["parts"] = f"there is no {PARTS}/ to compare with"
    if not any(facts.checksums for facts in gathered.images.values()):
        skipped["checksums"] = f"{INDEX} has none"
    return skipped
