"""A DICOM series, from a folder or a zip, with every slice accounted for.

Part of m3d-lamed; import through `m3d`.

SimpleITK (GDCM) reads headers and pixels: it decodes the JPEG, JPEG-LS, JPEG 2000, RLE and deflated transfer
syntaxes without plug-ins, where pydicom needs several (one of them GPL), and it is a core dependency already.
Its *series reader* is not used: it sorts quietly over gaps and takes the pixel type of the first slice for all. Here
each file is read alone, so its own rescale slope and intercept are applied, once, by GDCM; order, gaps and duplicates
are judged from ImagePositionPatient. Messages hold UIDs, numbers and file names, never patient fields.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from data_prep.formats.itk import LPS_TO_RAS
from data_prep.volume import BadScan, Volume

logger = logging.getLogger(__name__)

_UNEVEN = 0.05  # of the slice distance: scanners round positions, they do not move by a twentieth of a slice
_NOT_SCANS = {"SEG", "RTDOSE", "PR", "KO", "SR", "RTSTRUCT", "RTPLAN", "REG", "DOC"}
_CT, _MR, _PET = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128"


@dataclass(frozen=True, eq=False)
class _Slice:
    file: Path
    series: str
    number: str
    modality: str
    size: tuple[int, int]
    position: npt.NDArray[np.float64]
    axes: npt.NDArray[np.float64]  # mm per column step and per row step, LPS: (3, 2)

    @property
    def height(self) -> float:
        """Mm along the normal of the slice."""
        normal = np.cross(self.axes[:, 0], self.axes[:, 1])
        return float(self.position @ normal / np.linalg.norm(normal))


def read_folder(folder: Path, series: str | None = None) -> Volume:
    """Read the one series of a folder, sub-folders included; array axes are (slice, row, column)."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise BadScan("the folder is empty; a DICOM series is expected")
    slices = _choose([header for file in files if (header := _read_header(file)) is not None], series)
    slices.sort(key=lambda one: one.height)
    step = _even_step(slices)
    return Volume(_read_pixels(slices), _affine(slices[0], step))


def read_zip(path: Path, series: str | None = None) -> Volume:
    """Read the one series of a zip, through a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="m3d-dicom-") as name:
        folder = Path(name)
        try:
            _extract(path, folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise BadScan(f"the zip is damaged or encrypted ({error})") from error
        return read_folder(folder, series)


def _extract(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        need, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
        if need > free:
            space = f"{need / 1e6:.0f} MB, {folder.parent} has {free / 1e6:.0f} MB free"
            raise BadScan(f"unpacking needs {space}; set TMPDIR to a larger disk")
        for number, member in enumerate(members):
            place = PurePosixPath(member.filename.replace("\\", "/"))
            if place.is_absolute() or ".." in place.parts:
                raise BadScan(f"the zip has an entry that points outside of it: {member.filename!r}; it is not trusted")
            home = folder / f"{number:06d}"  # numbered: the archive's own paths are never used as paths
            home.mkdir()
            with archive.open(member) as source, (home / place.name).open("wb") as target:
                shutil.copyfileobj(source, target)


def _read_header(file: Path) -> _Slice | None:
    """What orders a slice; None for files that are no image (structures, reports, notes)."""
    with file.open("rb") as stream:
        start = stream.read(1024)
    reader = _reader(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if start[128:132] == b"DICM" and _storage_class(start).startswith((_CT, _MR, _PET)):
            raise BadScan(f"{file.name} is an image that cannot be read; truncated or damaged?") from error
        logger.info("%s: not a DICOM image, left out", file.name)
        return None
    modality = _text(reader, "0008|0060")
    if modality in _NOT_SCANS:
        return None
    if _text(reader, "0028|0008") not in ("", "1"):
        raise BadScan(f"{file.name} is a multi-frame (enhanced) DICOM; convert it to NIfTI first, as with dcm2niix")
    if reader.GetNumberOfComponents() != 1:
        raise BadScan(f"{file.name} is a colour image; a scan of one channel is needed")
    position, cosines, spacing = (_numbers(reader, tag) for tag in ("0020|0032", "0020|0037", "0028|0030"))
    if len(position) != 3 or len(cosines) != 6 or len(spacing) != 2:
        raise BadScan(f"{file.name} says not where it lies (no position, orientation or pixel spacing): a screenshot?")
    if min(spacing) <= 0:
        raise BadScan(f"{file.name} has a zero or negative pixel spacing: {spacing} mm")
    columns, rows = reader.GetSize()[:2]
    return _Slice(
        file=file,
        series=_text(reader, "0020|000e"),
        number=_text(reader, "0020|0011"),
        modality=modality,
        size=(rows, columns),
        position=np.array(position),
        axes=np.column_stack([np.array(cosines[:3]) * spacing[1], np.array(cosines[3:]) * spacing[0]]),
    )


def _choose(slices: Sequence[_Slice], series: str | None) -> list[_Slice]:
    groups: dict[str, list[_Slice]] = {}
    for one in slices:
        groups.setdefault(one.series, []).append(one)
    if not groups:
        raise BadScan("no DICOM image is in it")
    listing = "; ".join(
        f"{uid or repr('')} (number {group[0].number or '-'}, {group[0].modality or '-'}, {len(group)} slices)"
        for uid, group in sorted(groups.items())
    )
    if series is None and len(groups) > 1:
        raise BadScan(f"{len(groups)} series; choose one, pass series=UID (--series UID): {listing}")
    if series is not None and series not in groups:
        raise BadScan(f"no series {series!r}; there is: {listing}")
    return groups[series] if series is not None else next(iter(groups.values()))


def _even_step(slices: Sequence[_Slice]) -> npt.NDArray[np.float64]:
    """The one vector from slice to slice (LPS mm), or the name of the place where there is none."""
    first = slices[0]
    if len(slices) < 2:
        raise BadScan(f"the series has a single slice ({first.file.name}); a 3D scan is needed")
    for other in slices[1:]:
        if other.size != first.size or not np.allclose(other.axes, first.axes, atol=1e-3):
            pair = f"{first.file.name} and {other.file.name}"
            raise BadScan(f"slices differ in size, pixel spacing or orientation: {pair}; is a scout among them?")
    steps = [after.position - before.position for before, after in pairwise(slices)]
    usual = np.median(steps, axis=0)
    distance = float(np.linalg.norm(usual))
    for (before, after), step in zip(pairwise(slices), steps, strict=True):
        gap = after.height - before.height
        place = f"between {before.height:g} mm ({before.file.name}) and {after.height:g} mm ({after.file.name})"
        if gap < 1e-3:
            raise BadScan(f"two slices at the same place {place}: separate the phases or copies of this series first")
        if np.linalg.norm(step - usual) > _UNEVEN * distance:
            missing = round(gap / distance) - 1
            what = f"{missing} missing slice{'s' if missing > 1 else ''}" if missing > 0 else "uneven slices"
            raise BadScan(f"{what} {place}: {gap:g} mm apart where the others are {distance:g} mm; complete the series")
    mean: npt.NDArray[np.float64] = (slices[-1].position - first.position) / (len(slices) - 1)
    cosine = (slices[-1].height - first.height) / (len(slices) - 1) / float(np.linalg.norm(mean))
    if cosine < math.cos(math.radians(0.5)):
        tilt = math.degrees(math.acos(cosine))
        logger.warning("the gantry was tilted by %.1f degrees; the affine is sheared, distances stay exact", tilt)
    return mean


def _affine(first: _Slice, step: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Array index (slice, row, column) -> RAS mm."""
    affine = np.eye(4)
    affine[:3, :4] = np.column_stack([step, first.axes[:, 1], first.axes[:, 0], first.position])
    return LPS_TO_RAS @ affine


def _read_pixels(slices: Sequence[_Slice]) -> npt.NDArray[np.float32]:
    array = np.empty((len(slices), *slices[0].size), dtype=np.float32)
    for plane, one in zip(array, slices, strict=True):
        reader = _reader(one.file)
        reader.SetOutputPixelType(sitk.sitkFloat32)
        try:
            image = reader.Execute()
        except RuntimeError as error:
            raise BadScan(f"the pixels of {one.file.name} cannot be read; truncated or damaged?") from error
        plane[...] = sitk.GetArrayViewFromImage(image).reshape(one.size)  # a view: `image` must outlive it
    return array


def _reader(file: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    return reader


def _text(reader: sitk.ImageFileReader, tag: str) -> str:
    return str(reader.GetMetaData(tag)).strip(" \0") if reader.HasMetaDataKey(tag) else ""


def _numbers(reader: sitk.ImageFileReader, tag: str) -> list[float]:
    try:
        return [float(part) for part in _text(reader, tag).split("\\")]
    except ValueError:
        return []


def _storage_class(start: bytes) -> str:
    """MediaStorageSOPClassUID out of the file's first bytes (the meta header is always explicit little endian)."""
    at = start.find(b"\x02\x00\x02\x00UI")
    if at < 0:
        return ""
    length = int.from_bytes(start[at + 6 : at + 8], "little")
    return start[at + 8 : at + 8 + length].decode("ascii", "replace").strip(" \0")
