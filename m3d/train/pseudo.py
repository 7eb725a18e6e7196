"""A view of segmentation pretraining that sometimes shows pseudo-masks, and of scans without contours nothing else."""

# m = masks of a volume, (D, H, W) = the model's grid

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.pseudo_store import has_pseudo, pseudo_path, read_pseudo
from m3d.train.cases import StoredCase, TrainingCase, to_tensors
from m3d.train.views import Drawn, Look, Masks

NAMELESS = ""
"""What a pseudo-mask is called: it is never asked for by name."""


def check_pseudo(stores: tuple[str, ...]) -> None:
    """Whether all stores have pseudo-masks.

    Raises:
        FileNotFoundError: One has none.
    """
    without = next((root for root in stores if not has_pseudo(Path(root))), None)
    if without is not None:
        raise FileNotFoundError(f"data.pseudo: {without} has no pseudo-masks yet; make them: m3d data pseudo {without}")


@dataclass(frozen=True, kw_only=True)
class WithPseudo:
    """With probability ``share`` a volume's masks are regions that grey values set apart, else those of ``view``.

    As many regions are shown as structures would be. A scan without contours always shows regions.
    """

    view: Masks
    share: float

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if not 0 < self.share <= 1:
            raise ValueError(f"data.pseudo={self.share} must be a share, above 0 and up to 1")

    def wants(self, case: TrainingCase) -> bool:
        """Whether the case has labels, or regions."""
        return self.view.wants(case) or pseudo_path(case.image).is_file()

    def size(self, case: TrainingCase, rng: random.Random) -> int:
        """All volumes are alike."""
        return self.view.size(case, rng)

    def show(self, look: Look) -> Drawn:
        """Structures, or regions."""
        assert isinstance(look.case, StoredCase)
        if look.rng.random() >= self.share and self.view.wants(look.case):
            return self.view.show(look)
        case, augment = look.case, self.view.augment
        image, labels = to_tensors((look.arrays[0], read_pseudo(case.image)))
        generator = torch.Generator().manual_seed(look.rng.getrandbits(63))
        if augment is not None:
            moved = augment(
                image, labels, case.spacing, generator, sides=False, bound=(), orient=case.image.media.orient
            )
            image, labels = moved.image, moved.labels
        there = [region for region in labels.unique().tolist() if region]
        chosen = look.rng.sample(there, k=min(self.view.masks, len(there)))
        masks = [labels == region for region in chosen]
        stacked = torch.stack(masks) if masks else torch.zeros(0, 1, *image.shape, dtype=torch.bool)
        return Drawn(case.id, look.index, look.seed, image[None], stacked, (NAMELESS,) * len(chosen))
