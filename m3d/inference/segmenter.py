"""A mask head without a language model: it draws what names, points and boxes ask for, and says nothing.

`m3d.load` of a folder of pretrain_segvol, or of a converted SegVol, gives a `Segmenter`. Names go through the text
tower beside the head's weights ("A computerized tomography of a liver.").
"""

# M = masks, V = volumes, C = width of the head

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from data_prep.preprocess import Prepared, Preprocess
from m3d.inference.load import M3D
from m3d.inference.scan import Scan
from m3d.inference.talking import Asked, Spoken, stripped
from m3d.models import M3DVolumeFeatures
from m3d.models.name_reader import NameReader, read_name_reader
from m3d.models.name_tower import SENTENCE
from m3d.models.segvol import M3DSegVolConfig, PromptedSegVol, load_segvol
from segvol_head import ImageFeatures, Prompts, SegVol

__all__ = ["Head", "HeadScan", "Segmenter", "load_segmenter"]

NO_READER = (
    "the head has learned names from a language model, which is not in its folder; prompt it by points or a box, or "
    "build a whole model around it (`m3d train`, init.segvol)"
)


@dataclass(frozen=True, eq=False)
class Head:
    """A head and who reads names for it, as a `Scan` draws with it."""

    network: PromptedSegVol
    reader: NameReader | None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def config(self) -> M3DSegVolConfig:
        """What it is."""
        return self.network.config

    @property
    def seg_head(self) -> SegVol:
        """What draws."""
        return self.network.seg_head

    def get_image_features(self, pixel_values: Tensor) -> M3DVolumeFeatures:
        """Look at volumes ``(V, 1, D, H, W)`` once."""
        seen = self.network.look(pixel_values)
        return M3DVolumeFeatures(seg_tokens=seen.tokens, seg_detail=seen.detail)

    @torch.inference_mode()
    def name_prompt(self, name: str) -> Tensor | None:
        """What the head is told of a name, ``(1, C)``; None where nobody reads it."""
        if self.reader is None:
            return None
        projector = self.network.seg_projector
        prompt: Tensor = projector(self.reader.vectors([name]).to(self.device, self.network.dtype))
        return prompt

    def draw(
        self,
        features: M3DVolumeFeatures,
        *,
        text: Tensor | None = None,
        volume_index: Tensor,
        prompts: Prompts | None = None,
    ) -> Tensor:
        """As `M3DForConditionalGeneration.draw`."""
        assert features.seg_tokens is not None
        if text is not None:
            prompts = Prompts(text=text) if prompts is None else replace(prompts, text=text)
        assert prompts is not None
        seen = ImageFeatures(tokens=features.seg_tokens, detail=features.seg_detail)
        logits: Tensor = self.network.seg_head.decode(seen, prompts, volume_index)
        return logits

    def draw_on(self, pixel_values: Tensor, prompts: Prompts) -> Tensor:
        """As `M3DForConditionalGeneration.draw_on`."""
        drawn: Tensor = self.network.seg_head.decode(self.network.look(pixel_values), prompts)
        return drawn


@dataclass(frozen=True)
class Preparing:
    """What a head's scans go through; it has no words to prepare."""

    preprocess: Preprocess

    def pixels(self, prepared: Prepared) -> Tensor:
        """One scan as the head sees it: ``(1, D, H, W)`` in [0, 1]."""
        return torch.from_numpy(np.ascontiguousarray(prepared.array))[None]


@dataclass(frozen=True, eq=False)
class HeadScan(Scan):
    """A volume that a head without a language model has looked at: `segment` and `session` alone answer."""

    model: Head  # type: ignore[assignment]
    processor: Preparing  # type: ignore[assignment]

    @staticmethod
    @torch.inference_mode()
    def encode(model: Any, processor: Any, pixels: Tensor) -> tuple[M3DVolumeFeatures, Any]:  # noqa: ANN401
        """Features of one volume ``(1, D, H, W)``."""
        return model.get_image_features(pixels[None].to(model.device)), None

    def asked_to_draw(self, names: Sequence[str]) -> Iterator[Asked]:
        """What the text tower makes of each name."""
        for name in map(stripped, names):
            prompt = self.model.name_prompt(name)
            refused = NO_READER if prompt is None else ""
            yield Asked(name, SENTENCE.format(name), Spoken("", prompt), (name,), refused)

    def _silent(self, *_: Any, **__: Any) -> NoReturn:  # noqa: ANN401
        raise ValueError(
            f"{self.model_id} has no language model: it draws by names, points and boxes and says nothing; ask a whole "
            "model, such as m3d-tiny"
        )

    ask = ask_many = report = locate = log_likelihoods = _silent


@dataclass(frozen=True)
class Segmenter(M3D):
    """A loaded head; `look` at a scan, then `segment` it."""

    model: Head  # type: ignore[assignment]
    processor: Preparing  # type: ignore[assignment]

    scans: ClassVar[type[Scan]] = HeadScan


def load_segmenter(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> Segmenter:
    """Load a folder of pretrain_segvol, or a converted SegVol's.

    Raises:
        ValueError: The weights do not fit the config.
    """
    network = load_segvol(folder).to(device, dtype).eval()
    return Segmenter(name, Head(network, read_name_reader(folder)), Preparing(Preprocess.read(folder)))
