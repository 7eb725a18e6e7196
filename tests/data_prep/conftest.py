"""A phantom without symmetry, defined in patient millimetres, so that every grid's truth is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

# centre mm (RAS), radii mm, HU: three unequal blobs, no two alike along any axis
BLOBS = (((-14.0, 9.0, 12.0), (9.0, 6.0, 7.0), 300.0), ((13.0, -8.0, -5.0), (6.0, 10.0, 8.0), 60.0),
         ((2.0, 14.0, -16.0), (5.0, 5.0, 6.0), -80.0))  # fmt: skip
SHAPE, SPACING = (23, 30, 27), (2.5, 2.0, 2.25)


@dataclass(frozen=True)
class Phantom:
    """The same scene, drawn on any grid."""

    background: float = -1000.0

    def labels(self, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
        """Which blob (1, 2, 3; 0 none) holds the centre of each voxel."""
        index = np.indices(shape).reshape(3, -1)
        places = (affine[:3, :3] @ index).T + affine[:3, 3]
        labels = np.zeros(len(places), np.uint8)
        for number, (centre, radii, _) in enumerate(BLOBS, start=1):
            labels[(((places - centre) / radii) ** 2).sum(axis=1) <= 1] = number
        return labels.reshape(shape)

    def image(self, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
        """HU of the scene."""
        values = np.array([self.background, *(hu for _, _, hu in BLOBS)], np.float32)
        return values[self.labels(shape, affine)]


def centred(directions: np.ndarray, shape: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """Affine whose array centre is the patient's origin."""
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def directions_of(codes: str) -> np.ndarray:
    """Unit columns for axis codes like "PLI"."""
    units = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    return np.array([units[letter] for letter in codes], float).T


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    """About x, then y, then z."""
    result = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        one, two = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[one, one] = turn[two, two] = np.cos(angle)
        turn[one, two], turn[two, one] = -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result


ORIENTATIONS = ("RAS", "LPS", "SPL", "PLI", "IAR", "ASR", "LSA", "PIR")
POSES = {codes: directions_of(codes) for codes in ORIENTATIONS} | {
    "oblique": rotation((12.0, -9.0, 20.0)) @ directions_of("LPS"),
    "oblique-permuted": rotation((-17.0, 14.0, 8.0)) @ directions_of("SLA"),
}


@pytest.fixture
def phantom() -> Phantom:
    return Phantom()


@pytest.fixture(params=POSES)
def posed(request: pytest.FixtureRequest, phantom: Phantom) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, labels and affine of the phantom in one of ten poses, voxels not cubes."""
    affine = centred(POSES[request.param], SHAPE, SPACING)
    return phantom.image(SHAPE, affine), phantom.labels(SHAPE, affine), affine


@pytest.fixture
def tilted() -> Callable[[tuple[float, float, float]], np.ndarray]:
    return rotation


@pytest.fixture
def fixtures() -> Path:
    return Path(__file__).parents[1] / "fixtures"
