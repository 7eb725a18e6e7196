"""A 2D model as a baseline of retrieval: open_clip looks at ten axial slices, as PMC-CLIP does in the paper.

A scan is the mean of its slices' unit vectors, made a unit vector again. Slices lie in the middles of equal parts of
the scan, are turned as radiologists look at them, and go through open_clip's own preprocessing; grey 0 to 255 are the
limits of a window in HU, or those that the store was prepared with. Nothing is downloaded.
"""

# B = scans, S = slices of a scan, E = width of the embedding

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data_prep.record import Media
from m3d.bench.embeddings import weights_sha256
from m3d.train.cases import TrainingCase

__all__ = ["SlicesClip", "axial", "slice_places"]

SLICES = 10
BATCH = 64  # pictures that are encoded at once
CONFIG = "open_clip_config.json"
_FOLDER = f"a folder with {CONFIG}, the weights (open_clip_model.safetensors) and, where it has one, the tokenizer"


@dataclass(frozen=True, eq=False, kw_only=True)
class SlicesClip:
    """An open_clip model that sees slices; `load` makes one.

    ``window`` are limits in HU, such as (-160, 240) for soft tissue; None takes those of the store. ``slices`` of a
    scan are looked at.
    """

    name: str
    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    window: tuple[float, float] | None = None
    slices: int = SLICES

    @classmethod
    def load(
        cls,
        model: str | Path,
        pretrained: Path | None = None,
        *,
        device: torch.device | str = "cpu",
        window: tuple[float, float] | None = None,
        slices: int = SLICES,
    ) -> "SlicesClip":
        """Build a model by open_clip's name with the weights of a file, or one that a folder describes wholly.

        Raises:
            FileNotFoundError: The weights are not there.
            ModuleNotFoundError: open_clip is not installed.
            ValueError: open_clip has no such model, or it would have to be fetched in part.
        """
        open_clip = _open_clip()
        if slices < 1 or (window is not None and not window[0] < window[1]):
            raise ValueError(f"slices={slices} must be 1 or more, and window={window} limits in HU, lower first")
        name, given = _in_folder(Path(model)) if Path(model).is_dir() else _by_name(str(model), pretrained)
        try:
            built = open_clip.create_model(name, device=device, require_pretrained=True, **given)
        except RuntimeError as error:  # keys or sizes that do not fit, a broken file, no weights in the folder
            raise ValueError(f"{model}: its weights cannot be loaded ({error}); give those of this model") from error
        prepared = open_clip.transform.PreprocessCfg(**built.visual.preprocess_cfg)
        transform = open_clip.transform.image_transform_v2(prepared, is_train=False)
        return cls(
            name=Path(model).resolve().name, model=built.eval(), preprocess=transform,
            tokenizer=open_clip.get_tokenizer(name), window=window, slices=slices,
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        """Model, weights, slices and window: of a folder its name alone, so that a run may say it wherever it goes."""
        return {
            "kind": "open_clip on axial slices",
            "model": self.name,
            "weights_sha256": weights_sha256(self.model),
            "slices": self.slices,
            "window": None if self.window is None else list(self.window),
        }

    def check(self, cases: Sequence[TrainingCase]) -> None:
        """A window in HU needs scans of which HU are known."""
        for case in cases if self.window is not None else ():
            known = case.image.media.intensity
            if known.of != "HU" or known.lo is None:
                raise ValueError(f"{case.id} is not known in HU, so window={self.window} has no meaning; leave it out")

    @torch.inference_mode()
    def scans(self, volumes: Tensor, media: Sequence[Media]) -> Tensor:
        """``(B, D, H, W) -> (B, E)``, in [0, 1] over the store's limits."""
        pictures = [
            self.preprocess(Image.fromarray(grey).convert("RGB"))
            for volume, one in zip(volumes.cpu().numpy(), media, strict=True)
            for grey in self.pictures(volume, one)
        ]
        groups = (pictures[at : at + BATCH] for at in range(0, len(pictures), BATCH))
        seen = [self._encode_image(torch.stack(group)) for group in groups]
        return F.normalize(torch.cat(seen).unflatten(0, (len(volumes), self.slices)).mean(dim=1), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, cut at the context of the model."""
        encoded: Tensor = self.model.encode_text(self.tokenizer(list(texts)).to(self._device))  # type: ignore[operator]
        return F.normalize(encoded.float(), dim=-1)

    def pictures(self, volume: npt.NDArray[np.float32], media: Media) -> npt.NDArray[np.uint8]:
        """The slices that are looked at: ``(D, H, W) -> (S, rows, columns)``, 0 to 255."""
        standing = axial(volume, media.orient)
        shown = standing[slice_places(len(standing), self.slices)]
        if self.window is not None:
            low, high = media.intensity.lo, media.intensity.hi
            assert low is not None and high is not None  # `check` has seen to it
            shown = (shown * (high - low) + low - self.window[0]) / (self.window[1] - self.window[0])
        return np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)

    def _encode_image(self, pictures: Tensor) -> Tensor:
        encoded: Tensor = self.model.encode_image(pictures.to(self._device))  # type: ignore[operator]
        return F.normalize(encoded.float(), dim=-1)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def axial(volume: npt.NDArray[np.float32], orient: str | None) -> npt.NDArray[np.float32]:
    """The volume as axial slices from below, rows growing to the back and columns to the left of the patient ("SPL").

    Where it is not known how a volume lies, its first axis is taken for the one along the body.
    """
    if orient is None:
        return volume
    pairs = ("SI", "PA", "LR")
    order = [next(axis for axis, letter in enumerate(orient) if letter in pair) for pair in pairs]
    turned = volume.transpose(order)
    against = tuple(axis for axis, place in enumerate(order) if orient[place] == pairs[axis][1])
    return np.asarray(np.flip(turned, against))


def slice_places(depth: int, slices: int = SLICES) -> list[int]:
    """Which slices are looked at: those in the middles of as many equal parts."""
    return [int((2 * part + 1) * depth / (2 * slices)) for part in range(slices)]


# -- where a model is -----------------------------------------------------------------------------------------------


def _open_clip() -> ModuleType:
    try:
        return importlib.import_module("open_clip")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name!r} is needed here: pip install open_clip_torch") from error


def _by_name(name: str, pretrained: Path | None) -> tuple[str, dict[str, Any]]:
    """What open_clip needs to build a model of its own list."""
    config = _open_clip().get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip has no model {name!r}: see open_clip.list_models(), or give {_FOLDER}")
    text = config["text_cfg"]
    if fetched := text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise ValueError(f"{name} would fetch {fetched} from Hugging Face; give {_FOLDER} instead")
    if pretrained is None or not Path(pretrained).is_file():
        raise FileNotFoundError(
            f"pretrained={pretrained} is no file: place the weights of {name} on this machine (a .safetensors or .pt "
            "file of open_clip's) and give their path; nothing is downloaded"
        )
    return name, {"pretrained": str(pretrained)}


def _in_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """What open_clip needs to build what a folder describes; a text tower of Hugging Face's has its config there."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give {_FOLDER}")
    text = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    given: dict[str, Any] = {}
    if "hf_model_name" in text:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder / 'config.json'} is missing: place there the config of {text['hf_model_name']}, the text "
                "tower, and its tokenizer; nothing is downloaded"
            )
        given["text_cfg"] = {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}
    return f"local-dir:{folder}", given
