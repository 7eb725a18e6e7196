"""Find a checkpoint, check that it is one of ours and whole, and load it."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError

from data_prep.read import read_volume
from data_prep.volume import Volume
from m3d.inference.checkpoints import HEAD, kind_of, resolve
from m3d.inference.presence import Presence, read_presence
from m3d.inference.scan import Scan
from m3d.models import M3DForConditionalGeneration, M3DProcessor
from m3d.models.quantize import Quantize, quantization, refuse_odd_layers

log = logging.getLogger(__name__)

__all__ = ["M3D", "load"]


@dataclass(frozen=True)
class M3D:
    """A loaded model; `look` at a scan, then ask the `Scan`.

    ``presence`` says how likely a structure is in a scan at all, where `m3d calibrate` has fitted that.
    """

    id: str
    model: M3DForConditionalGeneration
    processor: M3DProcessor
    presence: Presence | None = None

    scans: ClassVar[type[Scan]] = Scan

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def look(
        self,
        scan: str | Path | Volume,
        *,
        series: str | None = None,
        spacing: tuple[float, float, float] | None = None,
    ) -> Scan:
        """Read and encode a scan once, so that it can be asked as often as you like.

        ``series`` picks one SeriesInstanceUID of a DICOM folder that holds several; ``spacing`` (mm along D, H, W) is
        needed for ``.npy``.

        Raises:
            FileNotFoundError, BadScan: The file is missing, broken or not a 3D scan; the message says what to do.
        """
        path = None if isinstance(scan, Volume) else Path(scan)
        volume = scan if isinstance(scan, Volume) else read_volume(Path(scan), series=series, spacing=spacing)
        began = time.monotonic()
        seen = self.scans.of(self.id, self.model, self.processor, volume, path)
        log.info("looked at %s in %.1f s", "the volume" if path is None else path.name, time.monotonic() - began)
        return replace(seen, presence=self.presence)


def pick_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        ValueError: The device is not available here.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if not available.get(name.split(":")[0], False):
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise ValueError(f"device {name!r} is not available here; use one of: auto, {usable}")
    return torch.device(name)


def load(
    name_or_path: str | Path = "m3d-tiny",
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    quantize: Quantize | None = None,
    calibrated: bool = True,
) -> M3D:
    """Load a bundled model by name or a checkpoint folder, on ``device``, in ``dtype``.

    A folder of pretrain_segvol, or a converted SegVol's, is a `m3d.inference.segmenter.Segmenter`, which only draws.

    Without ``dtype`` the weights are float32 on the CPU and MPS, bfloat16 on CUDA. ``quantize`` ("4bit" or "8bit")
    takes the language model alone, and needs bitsandbytes (``m3d-lamed[quantize]``). Without ``calibrated`` its
    ``presence.json`` is not read, as where it is made anew.

    Raises:
        FileNotFoundError: There is no such model or folder, or a file of it is missing.
        ValueError: The folder holds another architecture, its weights are cut or do not fit its config, or its
            ``presence.json`` is broken.
    """
    folder, where = resolve(name_or_path), pick_device(device)
    name = folder.resolve().parent.name if folder.name == "model" else folder.name
    if dtype is None:
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    if kind_of(folder) == HEAD:
        from m3d.inference.segmenter import load_segmenter  # which is an `M3D` itself

        if quantize is not None:
            raise ValueError(
                f"quantize={quantize!r}: {name} has no language model, which alone is quantised; leave it out"
            )
        log.warning("%s: for research, not for clinical use", name)
        return load_segmenter(folder, name, where, dtype)
    presence = read_presence(folder) if calibrated else None
    try:
        loaded: Any = M3DForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=None if quantize is None else quantization(quantize, dtype),
            device_map=None if quantize is None else {"": where},
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
        )
    except SafetensorError as error:
        raise ValueError(
            f"{folder}: the weights cannot be read ({error}); was the download cut? Fetch them again"
        ) from None
    model, info = loaded
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    wrong = {kind: keys for kind, keys in wrong.items() if keys}
    if wrong:
        what = "; ".join(f"{len(keys)} {kind.replace('_', ' ')}, such as {keys[0]}" for kind, keys in wrong.items())
        raise ValueError(f"{folder}: the weights do not fit config.json ({what}); they belong to another model")
    log.warning("%s: for research, not for clinical use", name)
    if quantize is None:
        model.to(where)
    else:
        refuse_odd_layers(model)
    return M3D(name, model.eval(), M3DProcessor.from_pretrained(folder), presence)
