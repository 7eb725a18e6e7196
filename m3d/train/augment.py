"""Random pose and contrast that leave the text true: the picture moves, is recoloured and, only if asked, mirrored.

What is said about a volume forbids changes of it: sides forbid mirroring, planes and directions forbid flips and
quarter turns, Hounsfield units forbid another contrast, and millilitres forbid scaling, which is why there is none at
all. `data_prep.laterality` reads the texts. MONAI draws everything; its spatial operations are lazy and end in one
interpolation, the same for image and labels.
"""

# D, H, W = array axes, L = label layers (where structures overlap)

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.laterality import PatientAxis, axis_of, swap_sides

if TYPE_CHECKING:
    from monai.data.meta_tensor import MetaTensor

Mirror = Literal["never", "unless_sided", "swap"]
Matrix = npt.NDArray[np.float64]
_PLANE = (1, 2)  # quarter turns turn H and W, as in the reference
_ANY_TEXT: frozenset[PatientAxis] = frozenset({"A", "S"})  # bound unless the caller read the texts


@dataclass(frozen=True, eq=False)
class Augmented:
    """A case after augmentation.

    ``matrix`` takes a voxel index AFTER to the one BEFORE, as `View.matrix` and `Lattice.matrix` do: a point or box of
    the old picture moves by its inverse. Where ``mirrored``, every text of the volume must go through
    `data_prep.laterality.mirrored` before masks and boxes are looked up by the names in it; texts that speak of no side
    come back from it as they were.
    """

    image: Tensor
    labels: Tensor
    matrix: Matrix
    mirrored: bool = False


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How much, and how often. The released code's values stand in brackets; where it has none, it does not do it.

    Attributes:
        probability: Of the motion, and of each change of intensity on its own [0.5].
        rotate_degrees: Largest angle about each axis; rigid in mm, however long the voxels are.
        shift_mm: Largest shift along each axis.
        gain: Largest relative change of brightness [0.1].
        offset: Largest change added, of an image in [0, 1] [0.1]. Ours is 0.05: 30 HU in a window of 600.
        noise: Largest standard deviation of Gaussian noise.
        contrast: Gamma is drawn from ``1 / (1 + contrast)`` to ``1 + contrast``.
        flip: Probability of a flip along each array axis [0.1]. Ours is 0: scans come oriented, so there is nothing to
            become robust against, and our texts speak of directions.
        quarter_turn: Probability of 90, 180 or 270 degrees in the plane of H and W [0.5]. Ours is 0, as for ``flip``.
        mirror: Whether a flip may exchange left and right: "never" (ours), "unless_sided" texts forbid it, or "swap"
            (labels are swapped, the caller swaps texts). A mirrored body is no body: only for symmetric regions. The
            released code mirrors whatever the text says.
    """

    rotate_degrees: float = 8.0
    shift_mm: float = 12.0
    gain: float = 0.1
    offset: float = 0.05
    noise: float = 0.02
    contrast: float = 0.1
    probability: float = 0.8
    flip: float = 0.0
    quarter_turn: float = 0.0
    mirror: Mirror = "never"

    def __post_init__(self) -> None:
        """Refuse what is no probability or no amount."""
        for name in ("probability", "flip", "quarter_turn"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a probability, from 0 to 1")
        for name in ("rotate_degrees", "shift_mm", "gain", "offset", "noise", "contrast"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be an amount of zero or more")
        if self.mirror not in ("never", "unless_sided", "swap"):
            raise ValueError(f"mirror={self.mirror!r} is not known; use never, unless_sided or swap")

    def __call__(
        self,
        image: Tensor,
        labels: Tensor,
        spacing: tuple[float, float, float],
        generator: torch.Generator,
        *,
        sides: bool,
        orient: str | None = "SPL",
        bound: Collection[PatientAxis] = _ANY_TEXT,
        density: bool = False,
        names: Mapping[int, str] | None = None,
        pose: bool | None = None,
    ) -> Augmented:
        """Move and recolour one case alike.

        Args:
            image: ``(D, H, W)`` in [0, 1].
            labels: ``(D, H, W)`` or ``(L, D, H, W)``; values and dtype are kept.
            spacing: mm along D, H, W.
            generator: The only source of chance; one number is taken from it.
            sides: Whether the texts of this volume speak of left or right.
            orient: Where the array axes grow to; None where that is lost, and then nothing is flipped.
            bound: Patient axes that the texts speak of (`bound_axes`); if not given, all directions count as spoken of.
            density: Whether the texts give Hounsfield units; then only noise is added.
            names: Label value -> name, for ``mirror="swap"``; given only where all texts are `mirrorable`. Without it,
                or where a structure has no counterpart, a volume with sided texts is not mirrored.
            pose: True moves, False only recolours, for texts that a rotation of a few degrees or a shift makes false
                ("lies 5 mm higher", "runs out of the scan"); None leaves it to ``probability``.
        """
        if labels.shape[-3:] != image.shape or image.ndim != 3 or labels.ndim not in (3, 4):
            raise ValueError(f"labels {tuple(labels.shape)} do not lie on the voxels of an image {tuple(image.shape)}")
        seed = int(torch.randint(2**32 - 1, (), generator=generator))
        state = np.random.RandomState(seed)
        swaps = _swaps(names) if self.mirror == "swap" else None
        matrix, flipped = np.eye(4), tuple[int, ...]()
        if pose is None:
            pose = bool(state.uniform() < self.probability)
        if pose or self.flip or self.quarter_turn:
            flips = self._flips(sides, bound, orient, swappable=swaps is not None)
            turns = self._may_turn(sides, bound, orient)
            matrix, flipped = self._motion(image, spacing, state, flips, turns=turns, pose=pose)
        if not np.array_equal(matrix, np.eye(4)):
            layers = labels if labels.ndim == 4 else labels[None]
            image = _sampled(image[None], matrix, "bilinear")[0]
            labels = _sampled(layers, matrix, "nearest").to(labels.dtype).reshape(labels.shape)
        mirror = orient is not None and axis_of(orient).index("R") in flipped
        if mirror and swaps is not None:
            labels = _relabelled(labels, swaps)
        return Augmented(self._recolour(image, state, density=density), labels, matrix, mirror)

    def _flips(
        self, sides: bool, bound: Collection[PatientAxis], orient: str | None, *, swappable: bool
    ) -> tuple[int, ...]:
        """Array axes that may be flipped.

        A body flipped front to back or upside down is its own mirror image, turned round. So sided texts forbid every
        flip but the one whose texts are swapped, and so does ``mirror="never"`` with R-L.
        """
        if orient is None or self.flip == 0:
            return ()
        sided = sides or "R" in bound
        mirror = {"never": False, "unless_sided": not sided, "swap": swappable or not sided}[self.mirror]
        free = {"R": mirror, "A": not sided and "A" not in bound, "S": not sided and "S" not in bound}
        return tuple(number for number, axis in enumerate(axis_of(orient)) if free[axis])

    def _may_turn(self, sides: bool, bound: Collection[PatientAxis], orient: str | None) -> bool:
        if orient is None or self.quarter_turn == 0:
            return False
        turned = {axis_of(orient)[number] for number in _PLANE}
        return not turned & ({*bound, "R"} if sides else set(bound))

    def _motion(
        self,
        image: Tensor,
        spacing: tuple[float, float, float],
        state: np.random.RandomState,
        flips: tuple[int, ...],
        *,
        turns: bool,
        pose: bool,
    ) -> tuple[Matrix, tuple[int, ...]]:
        """Flip, turn and shift a lazy tensor, which composes their matrices; also the array axes that were flipped."""
        from monai.transforms.spatial import array as spatial

        lazy: Any = _lazy(image)
        for axis in flips:
            flip: Any = spatial.RandFlip(prob=self.flip, spatial_axis=axis, lazy=True)
            lazy = flip.set_random_state(state=state)(lazy)
        flipped = tuple(np.flatnonzero(np.diag(_matrix(lazy)) < 0).tolist())
        if turns:
            turn: Any = spatial.RandRotate90(prob=self.quarter_turn, max_k=3, spatial_axes=_PLANE, lazy=True)
            lazy = turn.set_random_state(state=state)(lazy)
        turned = np.linalg.norm(np.diag(spacing) @ _matrix(lazy)[:3, :3], axis=0)  # mm along the axes as they are now
        moved = self._pose(state) if pose else np.eye(4)
        moved = np.diag([*(1 / turned), 1.0]) @ moved @ np.diag([*spacing, 1.0])
        if not np.allclose(moved, np.eye(4)) or tuple(lazy.peek_pending_shape()) != tuple(image.shape):
            lazy = spatial.Affine(affine=moved, spatial_size=image.shape, image_only=True, lazy=True)(lazy)
        return _matrix(lazy), flipped

    def _pose(self, state: np.random.RandomState) -> Matrix:
        """A rigid motion about the centre, in mm."""
        from monai.transforms.spatial.array import RandAffineGrid

        if self.rotate_degrees == self.shift_mm == 0:
            return np.eye(4)
        angle = float(np.deg2rad(self.rotate_degrees))
        turn, shift = (angle,) * 3, (self.shift_mm,) * 3
        draw: Any = RandAffineGrid(rotate_range=turn, translate_range=shift, lazy=True)
        draw.set_random_state(state=state)
        draw(spatial_size=(1, 1, 1))
        matrix: Matrix = draw.get_transformation_matrix().double().numpy()
        return matrix

    def _recolour(self, image: Tensor, state: np.random.RandomState, *, density: bool) -> Tensor:
        """Change intensities within the picture: what is black (air, and where nothing was scanned) stays black."""
        coloured = image[None]
        for change in self._changes(density=density):
            coloured = change.set_random_state(state=state)(coloured)
        plain: Tensor = coloured.as_tensor() if hasattr(coloured, "as_tensor") else coloured
        return torch.where(image > 0, plain[0], 0.0).clamp(0, 1)

    def _changes(self, *, density: bool) -> Iterator[Any]:
        from monai.transforms.intensity import array as intensity

        chance = self.probability
        if self.contrast and not density:
            gamma = (1 / (1 + self.contrast), 1 + self.contrast)
            yield intensity.RandAdjustContrast(prob=chance, gamma=gamma)
        if self.gain and not density:
            yield intensity.RandScaleIntensity(factors=self.gain, prob=chance)
        if self.offset and not density:
            yield intensity.RandShiftIntensity(offsets=self.offset, prob=chance)
        if self.noise:
            yield intensity.RandGaussianNoise(prob=chance, std=self.noise)


def _lazy(image: Tensor) -> MetaTensor:
    """The image as a tensor that collects spatial operations, in voxel indices."""
    from monai.data.meta_obj import get_track_meta
    from monai.data.meta_tensor import MetaTensor

    if not get_track_meta():
        raise ValueError("MONAI's metadata tracking is off, and with it lazy operations; call set_track_meta(True)")
    return MetaTensor(image[None], affine=torch.eye(4, dtype=torch.float64))


def _matrix(lazy: MetaTensor) -> Matrix:
    matrix: Matrix = lazy.peek_pending_affine().double().numpy()
    return matrix


def _sampled(array: Tensor, matrix: Matrix, mode: str) -> Tensor:
    """All operations in one interpolation; where they are flips and turns alone, voxels are moved exactly."""
    from monai.transforms.lazy.functional import apply_pending

    overrides = {"mode": mode, "padding_mode": "zeros", "dtype": torch.float32}
    done, _ = apply_pending(array.float(), pending=[torch.from_numpy(matrix)], overrides=overrides)
    plain: Tensor = done.as_tensor()
    return plain


def _swaps(names: Mapping[int, str] | None) -> dict[int, int] | None:
    """The partner of each label, None where a side has no counterpart."""
    try:
        return None if names is None else swap_sides(names)
    except ValueError:
        return None


def _relabelled(labels: Tensor, swaps: Mapping[int, int]) -> Tensor:
    values = labels.long()
    table = torch.arange(max(int(values.max()), *swaps, 0) + 1)
    for value, partner in swaps.items():
        table[value] = partner
    return table[values].to(labels.dtype)
