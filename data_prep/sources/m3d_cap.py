"""M3D-Cap: CT series of Radiopaedia with the reports of their cases (Bai et al., arXiv 2404.00578).

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import difflib
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from data_prep.draft import Draft
from data_prep.sources.base import SPLITS, Entry
from data_prep.sources.m3d_volumes import (
    OnLeak,
    find_table,
    identify,
    listed_entries,
    locate,
    path_parts,
)
from data_prep.sources.tables import BadTable, OnBadRow, read_json, settle_rows

__all__ = ["M3DCap", "find_series", "series_of", "study_findings"]

FOLDERS = ("M3D_Cap_npy", "M3D_Cap", "M3D-Cap", "M3D-Cap/M3D_Cap_npy", "M3D-Cap/M3D_Cap")
_SHORTEST = 5  # letters; below that, a section counts as empty, as published

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Series:
    """One image as the lists name it: the splits, the further test lists, and the report."""

    path: Path
    patient: str
    report: str
    splits: set[str] = field(default_factory=set)
    subsets: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class M3DCap:
    """M3D-Cap as published, prepared or raw; ``root`` is the data root or the folder of the table itself.

    ::

        M3D_Cap_npy/                                  prepared
            M3D_Cap.json                              {train, validation, test, test1k, test500, test100, hard_test}:
                                                      [{"image": "M3D_Cap_npy/ct_case/000006/Axial_C.npy",
                                                        "text":  "M3D_Cap_npy/ct_case/000006/text.txt"}, ...]
            ct_case/<case>/<series>.npy               float (1, 32, 256, 256) in [0, 1]
            ct_case/<case>/text.txt                   the report of the case, for all its series
            ct_quizze/<case>/...
        M3D_Cap/                                      raw
            ct_case/<case>/<series>/<number>.jpeg     8-bit slices, or .png
            ct_case/<case>/text.txt                   sections such as ``study_findings:`` and ``discussion:``

    A listed ``.npy`` that is not there is looked for among the raw slices. A patient is a case: its series share one
    split. The lists ``test1k``, ``test500``, ``test100`` and ``hard_test`` make no further images, they are
    ``meta["subsets"]`` of the test images. Reports are taken whole. ``table`` names another list file.

    ``rejected`` holds, after `entries`, the rows that ``on_bad_row="skip"`` left out.
    """

    name: ClassVar[str] = "m3d_cap"

    root: Path
    table: str = "M3D_Cap.json"
    license: str | None = None
    on_bad_row: OnBadRow = "error"
    on_leak: OnLeak = "error"
    rejected: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    def entries(self) -> Iterator[Entry]:
        """Every listed image with its report, in the order of the lists.

        Raises:
            FileNotFoundError: The list file is not there, or none of the images is.
            BadTable: The lists cannot be used, or share images or patients.
        """
        path = find_table(self.root, (self.table,), FOLDERS)
        if path is None:
            raise FileNotFoundError(f"{self.root}: no {self.table} in it nor in {', '.join(FOLDERS)}; check the root")
        self.rejected.clear()
        found = self._series(path)
        settle_rows(str(path), self.rejected, on_bad_row=self.on_bad_row)
        yield from listed_entries(
            str(path),
            found,
            {image: one.splits for image, one in found.items()},
            lambda image, split: _drafts(found[image]),
            license=self.license,
            on_leak=self.on_leak,
        )

    def _series(self, path: Path) -> dict[str, _Series]:
        found: dict[str, _Series] = {}
        reports: dict[Path, str] = {}
        repeats: dict[str, int] = defaultdict(int)
        for key, number, row in _rows(path):
            where = f"{path}, {key}[{number}]"
            try:
                image, one = self._read_row(row, where, reports)
                known = found.setdefault(image, one)
                if (known.path, known.report) != (one.path, one.report):
                    raise BadTable(f"{where}: {image} was listed before with another file or report; remove one")
            except (BadTable, OSError) as error:
                self.rejected.append(str(error))
                continue
            if key in SPLITS:
                repeats[key] += key in known.splits
                known.splits.add(key)
            else:
                known.subsets.add(key)
        for one in found.values():
            one.splits = one.splits or {"test"}  # in a further test list only
        for key, count in repeats.items():
            if count:
                logger.warning("%s: %d rows of %s repeat an image; taken once", path, count, key)
        return found

    def _read_row(self, row: object, where: str, reports: dict[Path, str]) -> tuple[str, _Series]:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("image", "text")):
            raise BadTable(f'{where}: an item {{"image": path, "text": path}} is needed')
        parts = path_parts(row["image"], where)
        image, patient = series_of(parts)
        report = self._report(row["text"], where, reports)
        return image, _Series(find_series(self.root, parts), patient, report)

    def _report(self, text: str, where: str, reports: dict[Path, str]) -> str:
        """What ``text`` says, which is a path to a text file, or the report itself."""
        if not text.endswith(".txt"):
            if len(text.split()) < 2:
                raise BadTable(f"{where}: text {text!r} is neither a path to a .txt file nor a report")
            return study_findings(text)
        path = find_series(self.root, path_parts(text, where))
        if path not in reports:
            if not path.is_file():
                raise BadTable(f"{where}: the report {path} is not there")
            try:
                reports[path] = study_findings(path.read_text(encoding="utf-8-sig"))
            except UnicodeError as error:
                raise BadTable(f"{where}: the report {path} is not UTF-8 text; save it as such") from error
        if not reports[path]:
            raise BadTable(f"{where}: the report {path} is empty")
        return reports[path]


def _rows(path: Path) -> Iterator[tuple[str, int, object]]:
    """List name, place in it, item; a further list is one whose name speaks of a test."""
    lists = read_json(path)
    if not isinstance(lists, dict):
        raise BadTable(f"{path}: lists by split are needed, {{train: [...], validation: [...], test: [...]}}")
    for key, rows in lists.items():
        if not isinstance(rows, list):
            continue  # a description of the data set
        if key not in SPLITS and "test" not in key:
            close = difflib.get_close_matches(key, SPLITS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(SPLITS)} and names with 'test'"
            raise BadTable(f"{path}: unknown list {key!r}; {hint}")
        yield from ((key, number, row) for number, row in enumerate(rows))
    if not any(isinstance(lists.get(key), list) and lists[key] for key in SPLITS):
        raise BadTable(f"{path}: no list {', '.join(SPLITS)} with anything in it; was the download cut short?")


def _drafts(one: _Series) -> tuple[Draft, ...]:
    meta = {"subsets": sorted(one.subsets)} if one.subsets else {}
    return (
        Draft(task="report", template="m3d.report", text=one.report, meta=meta),
        Draft(task="retrieval", template="m3d.retrieval", text=one.report, meta=meta),
    )


def series_of(parts: tuple[str, ...]) -> tuple[str, str]:
    """The id of an image of M3D-Cap and its patient's, from the parts of its path: ``.../ct_case/<case>/<series>``."""
    names = (*parts[-3:-1], parts[-1].removesuffix(".npy"))
    return identify(*names), identify(*(names[:-1] or names))


def find_series(root: Path, parts: tuple[str, ...]) -> Path:
    """Where an image of M3D-Cap, or a text beside it, lies under the data root: prepared, or else raw."""
    return locate(parts, roots=(root, root / "M3D-Cap"), raw_suffix="")


def study_findings(text: str) -> str:
    """The findings of a case's text, or its discussion, or all of it, in one line: M3D-Cap's own rule."""
    for heading in ("study_findings:", "discussion:"):
        _, there, section = text.partition(heading)
        said = " ".join((section if there else text).split())
        if len(said.replace(" ", "")) >= _SHORTEST:
            return said
    return " ".join(text.split())
