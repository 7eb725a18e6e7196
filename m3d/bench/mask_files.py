"""Masks of answers as files: NIfTI on the grid that is judged, written by a run and read by whoever judges or shows."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.formats.nifti import read_nifti
from data_prep.volume import BadScan, Volume
from data_prep.write import write_mask
from m3d.bench.cases import Question
from m3d.bench.kinds import TEXT
from m3d.bench.predictions import DrawnMask, Sight
from m3d.inference.results import slug

__all__ = ["keep_mask", "read_mask"]


def keep_mask(
    folder: Path, question: Question, sight: Sight, number: int, name: str, mask: npt.NDArray[np.bool_], like: Volume
) -> str:
    """Write the mask ``number`` of an answer; its path in the folder of the run."""
    record = question.record
    tail = record.id.removeprefix(f"{record.image_id}/").replace("/", "-")
    asked = tail if question.by == TEXT else f"{tail}-{slug(question.by)}"
    path = f"masks/{sight}/{record.image_id}/{asked}-{number}-{slug(name)}.nii.gz"
    write_mask(folder / path, mask, like=like)
    return path


def read_mask(folder: Path, mask: DrawnMask, like: Volume) -> npt.NDArray[np.bool_]:
    """The voxels of a mask that was kept, checked to lie on the voxels of ``like``.

    Raises:
        ValueError: The file cannot be read, or its mask lies on another grid.
    """
    path = folder / str(mask.file)
    try:
        found = read_nifti(path)
    except (OSError, BadScan) as error:
        raise ValueError(
            f"{path}: the mask cannot be read ({error}); draw it anew, in a run of its own --out"
        ) from None
    if found.shape != like.shape or not np.allclose(found.affine, like.affine, atol=1e-2):
        raise ValueError(
            f"{path}: the mask lies on {found.shape} voxels in {found.orientation}, what it is judged on has "
            f"{like.shape} in {like.orientation}; give the `scans` of the run, or masks on the grid that is judged"
        )
    return np.asarray(found.array > 0.5)
