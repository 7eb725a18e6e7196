"""Which scan `m3d demo` takes: named, found under ``$M3D_DATA``, downloaded, or made; and why that one."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from m3d.cli.common import working
from m3d.convert.hub import cache_dir

if TYPE_CHECKING:
    from data_prep.case import Case
    from data_prep.volume import Volume

FALLBACK_SEED = 20_001  # far from the seeds that the bundled model was trained on
TIMEOUT = 6.0
CT, CONTOURS = "ct.nii.gz", "structures.nii.gz"


@dataclass(frozen=True, eq=False)
class Chosen:
    """A scan with its labels, if it has any, and the reasons for taking it."""

    kind: Literal["named", "data", "download", "phantom"]
    volume: Volume
    path: Path | None
    case: Case | None
    reasons: tuple[str, ...] = ()


def choose(
    named: Path | None,
    *,
    phantom: int | None = None,
    series: str | None = None,
    spacing: tuple[float, float, float] | None = None,
) -> Chosen:
    """The first of: the scan named, the phantom asked for, a case under ``$M3D_DATA``, a download, a phantom."""
    if named is not None:
        return _named(named, series, spacing)
    if phantom is not None:
        return _phantom(phantom, f"phantom {phantom}, as asked for")
    reasons = ["no scan was named"]
    folder, reason = _under_data()
    if folder is not None:
        return replace(_labelled(folder), kind="data", reasons=(*reasons, reason))
    reasons.append(reason)
    folder, reason = _downloaded()
    if folder is not None:
        return replace(_labelled(folder), kind="download", reasons=(*reasons, reason))
    made = _phantom(FALLBACK_SEED, f"so phantom {FALLBACK_SEED} was made")
    return replace(made, reasons=(*reasons, reason, *made.reasons))


def _named(path: Path, series: str | None, spacing: tuple[float, float, float] | None) -> Chosen:
    from data_prep.read import read_volume

    folder = path if path.is_dir() and (path / CT).is_file() else path.parent
    if (path.is_dir() or path.name == CT) and (folder / CT).is_file() and (folder / CONTOURS).is_file():
        try:
            return replace(_labelled(folder), reasons=("named on the command line",))
        except ValueError as error:  # a scan that is broken itself is told below
            reasons: tuple[str, ...] = (f"{CONTOURS} beside it is not used: {error}",)
    else:
        reasons = ()
    target = path / CT if path.is_dir() and (path / CT).is_file() else path
    with working(f"reading {target.name}"):
        volume = read_volume(target, series=series, spacing=spacing)
    return Chosen("named", volume, target, None, ("named on the command line", *reasons))


def _labelled(folder: Path) -> Chosen:
    from data_prep.openkbp import read_case

    with working(f"reading {folder.name}"):
        case = read_case(folder)
    return Chosen("named", case.volume, folder / CT, case)


def _under_data() -> tuple[Path | None, str]:
    """A case of ``$M3D_DATA``: of its validation patients, never of those the model was trained on."""
    root = os.environ.get("M3D_DATA")
    if not root:
        return None, "$M3D_DATA is not set"
    for folder in (Path(root), Path(root) / "openkbp", Path(root) / "data" / "openkbp"):
        for pattern in (f"validation/*/{CT}", CT, f"*/{CT}"):
            found = sorted(path.parent for path in folder.glob(pattern) if (path.parent / CONTOURS).is_file())
            if found:
                return found[0], f"case {found[0].name} of $M3D_DATA"
    return None, f"$M3D_DATA holds no case (a folder with {CT} and {CONTOURS})"


def _downloaded() -> tuple[Path | None, str]:
    from data_prep.openkbp import FetchFailed, fetch_case

    cache = cache_dir() / "openkbp"
    try:
        with working("downloading a public OpenKBP case (or finding it in the cache)"):
            folder = fetch_case(cache, timeout=TIMEOUT)
    except FetchFailed as error:
        return None, f"no public case could be downloaded ({' '.join(str(error).split())})"
    except OSError as error:  # a cache that cannot be written
        return None, f"no public case could be kept in {cache} ({error.strerror or error}; set XDG_CACHE_HOME)"
    return folder, f"OpenKBP case {folder.name} (public, MIT licence), kept in the cache"


def _phantom(seed: int, reason: str) -> Chosen:
    from data_prep.phantoms import head_neck

    if seed < 0:
        raise ValueError(f"--phantom needs a seed of 0 or more, got {seed}")
    with working(f"making phantom {seed}"):
        case = head_neck(seed)
    return Chosen("phantom", case.volume, None, case, (f"{reason}: an analytic head and neck, not a patient",))
