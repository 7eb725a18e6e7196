"""What a MONAI bundle's ``inference.json`` names: the network, and the way of a scan to its grid and back.

The bundle has no language model. A structure's name is the vector with which the language model would ask for it, read
once without any volume (`m3d.train.drawing`); clicks and boxes are what they are in `Scan.segment`.
"""

# B = volumes, K = structures, P = points, C = width of the head, (D, H, W) = the model's grid, (I, J, L) = the scan

import json
import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import MapTransform
from torch import Tensor, nn

from data_prep.boxes import Box
from data_prep.preprocess import Preprocess
from data_prep.volume import Volume
from data_prep.way import Way
from data_prep.write import write_mask
from m3d.inference.prompting import Point, as_prompts, place_box, place_points, refuse_contradictions
from m3d.inference.results import distinct_slugs
from m3d.models.segvol import M3DSegVolConfig, PromptedSegVol
from m3d.models.weights import put, read_weights
from segvol_head import Prompts

log = logging.getLogger(__name__)

VECTORS = "name_vectors"
WAY, PROMPTS = "m3d_way", "prompts"
OUTSIDE = -30.0  # logits where the crop cut away, as `Scan` fills them


class NamedSegVol(nn.Module):
    """The mask head as a network of MONAI's kind: a channel of logits for each of its structures.

    ``names`` are all that it has vectors of, ``structures`` those that it draws; without any it draws one mask of what
    is pointed at.
    """

    name_vectors: Tensor

    def __init__(self, config: M3DSegVolConfig, names: Sequence[str], structures: Sequence[str] | None = None) -> None:
        super().__init__()
        self.names = tuple(names)
        self.structures = self.names if structures is None else tuple(structures)
        unknown = [name for name in self.structures if name not in self.names]
        if unknown:
            raise ValueError(f"no structure {unknown[0]!r} in this bundle; it has {', '.join(self.names)}")
        self.segvol = PromptedSegVol(config)
        self.register_buffer(VECTORS, torch.zeros(len(self.names), config.text_width))

    def forward(
        self,
        image: Tensor,
        points: Tensor | None = None,
        point_labels: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """``(B, 1, D, H, W)`` in [0, 1] -> ``(B, K, D, H, W)`` logits, above 0 inside.

        Points ``(B, P, 3)`` with labels ``(B, P)``, and boxes ``(B, 6)`` with inclusive corners, are voxels of the grid
        and about one structure: beside a name, or alone.

        Raises:
            ValueError: They are given beside several structures, or there is nothing to draw.
        """
        pixels = image.as_tensor() if isinstance(image, MetaTensor) else image
        features = self.segvol.look(pixels)
        count = max(len(self.structures), 1)
        owner = torch.arange(len(pixels), device=pixels.device).repeat_interleave(count)
        given = {"points": points, "point_labels": point_labels, "boxes": boxes}
        given = {name: value for name, value in given.items() if value is not None}
        if given and count > 1:
            raise ValueError(f"points and boxes are about one structure; structures has {count}")
        rows = [self.names.index(name) for name in self.structures]
        names = self.name_vectors[rows].repeat(len(pixels), 1) if rows else None
        logits = self.segvol.draw(features, owner, names=names, prompts=Prompts(**given) if given else None)
        return logits.reshape(len(pixels), count, *logits.shape[2:])


def read_network(folder: str | Path, structures: Sequence[str] | None = None) -> NamedSegVol:
    """The network of a bundle's ``models`` folder, for all of its structures or some.

    Raises:
        ValueError: It has no such structure, or its weights are not those of its config.
    """
    folder = Path(folder)
    names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["structures"]
    network = NamedSegVol(M3DSegVolConfig.from_pretrained(folder), names, structures)
    put(network, read_weights(folder), str(folder))
    return network.eval()


class Preparedd(MapTransform):  # the second d is MONAI's, for dictionaries
    """A scan, ``(1, I, J, L)`` in its own units, onto the model's grid, ``(1, D, H, W)`` in [0, 1].

    ``points`` are ``[i, j, l, label]``, label 1 inside and 0 outside; ``box`` is ``[i0, j0, l0, i1, j1, l1]`` and ends
    before its upper corner; both in voxels of the scan, or with ``frame="mm"`` in patient coordinates (RAS). The way
    back travels in the meta data.
    """

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        preprocess: str | Path,
        points: Sequence[Sequence[float]] | None = None,
        box: Sequence[float] | None = None,
        frame: str = "voxel",
    ) -> None:
        super().__init__(keys)
        self.preprocess = Preprocess.read(Path(preprocess).parent)
        if frame not in ("voxel", "mm"):
            raise ValueError(f"frame={frame!r} is none of voxel, mm")
        if any(len(point) != 4 for point in points or []) or len(box or range(6)) != 6:
            raise ValueError(f"points are lists of [i, j, l, label] and a box has six numbers; got {points}, {box}")
        self.points, self.box, self.frame = list(points or []), box, frame

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Prepare every key; prompts are those of the last.

        Raises:
            BadScan, ValueError: The scan cannot be used, or a prompt lies outside of it.
        """
        done = dict(data)
        for key in self.key_iterator(done):
            scan: MetaTensor = done[key]
            volume = Volume(np.asarray(scan.as_tensor()[0], dtype=np.float32), np.asarray(scan.affine))
            prepared = self.preprocess.apply(volume)
            meta = {"filename_or_obj": str(scan.meta.get("filename_or_obj", "scan"))}
            meta[WAY] = json.dumps({**prepared.to_dict(), "scan_affine": volume.affine.tolist()})
            grid = torch.from_numpy(np.ascontiguousarray(prepared.array))[None]
            done[key] = MetaTensor(grid, affine=torch.from_numpy(prepared.affine), meta=meta)
            done[PROMPTS] = self._prompts(prepared, volume)
        return done

    def _prompts(self, way: Way, volume: Volume) -> dict[str, Tensor]:
        """What the network takes beside an image, for one of a batch."""
        frame: Any = self.frame
        points: list[Point] = [
            (place_points([point[:3]], volume, frame=frame)[0], int(point[3])) for point in self.points
        ]
        box = None
        if self.box is not None:
            lo, hi = tuple(map(float, self.box[:3])), tuple(map(float, self.box[3:]))
            box = place_box(Box(lo, hi, frame), volume)
        refuse_contradictions(points, box)
        placed = as_prompts(way, points, box)
        if placed is None:
            return {}
        given = {name: getattr(placed, name) for name in ("points", "point_labels", "boxes")}
        return {name: value[0] for name, value in given.items() if value is not None}


class OnScand(MapTransform):
    """Logits on the grid, ``(K, D, H, W)``, as masks on the scan's own voxels.

    As one label map ``(1, I, J, L)``: k where structure k, counted from 1, is drawn; what several share goes to the one
    of the highest logit. With ``separate`` each has a channel of its own, ``(K, I, J, L)``.
    """

    def __init__(self, keys: Hashable | Sequence[Hashable], image: Hashable = "image", separate: bool = False) -> None:
        super().__init__(keys)
        self.image, self.separate = image, separate

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring logits, not masks, back: the edge is then found at the scan's own resolution."""
        done = dict(data)
        for key in self.key_iterator(done):
            meta = done[self.image].meta
            fields = json.loads(meta[WAY])
            affine = torch.tensor(fields.pop("scan_affine"), dtype=torch.float64)
            way = Way.from_dict(fields)
            highest = np.zeros(way.scan_shape, np.float32)
            labels = np.zeros((len(done[key]) if self.separate else 1, *way.scan_shape), np.uint8)
            for number, logits in enumerate(done[key], start=1):
                on_scan = way.to_scan(np.asarray(logits.float().cpu()), order=1, fill=OUTSIDE)
                if self.separate:
                    labels[number - 1] = on_scan > 0
                    continue
                labels[0][on_scan > highest] = number
                np.maximum(highest, on_scan, out=highest)
            done[key] = MetaTensor(
                torch.from_numpy(labels), affine=affine, meta={"filename_or_obj": meta["filename_or_obj"]}
            )
        return done


class WriteMasksd(MapTransform):
    """Masks of `OnScand` as NIfTI with the scan's own affine: ``SCAN_seg.nii.gz``, or ``SCAN_STRUCTURE.nii.gz`` each.

    SaveImaged of MONAI 1.6.1 takes such a mask for two-dimensional and fails where the affine's upper left 2x2 block is
    singular, as in a sagittal scan.
    """

    def __init__(
        self, keys: Hashable | Sequence[Hashable], output_dir: str | Path, structures: Sequence[str] = ()
    ) -> None:
        super().__init__(keys)
        self.output_dir, self.structures = Path(output_dir), tuple(structures)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write every key's masks, whole files or none."""
        for key in self.key_iterator(dict(data)):
            masks: MetaTensor = data[key]
            stem = stem_of(masks.meta["filename_or_obj"])
            kinds = ["seg"] if len(masks) == 1 else distinct_slugs(self.structures)
            for kind, mask in zip(kinds, masks.as_tensor().numpy(), strict=True):
                like = Volume(np.zeros(mask.shape, np.float32), np.asarray(masks.affine))
                path = self.output_dir / f"{stem}_{kind}.nii.gz"
                write_mask(path, mask, like=like)
                log.info("wrote %s", path)
        return dict(data)


def prepare_batch(
    batchdata: Mapping[str, Any],
    device: torch.device | str | None = None,
    non_blocking: bool = False,
    **more: Any,  # noqa: ANN401 - as MONAI hands them on
) -> tuple[Tensor, None, tuple[()], dict[str, Tensor]]:
    """Image and prompts of a batch, as MONAI's engines hand them to the inferer."""
    prompts = {
        name: value.to(device=device, non_blocking=non_blocking) for name, value in batchdata.get(PROMPTS, {}).items()
    }
    return batchdata["image"].to(device=device, non_blocking=non_blocking, **more), None, (), prompts


def scans(image: str | Sequence[str] | None, dataset_dir: str | Path) -> list[dict[str, str]]:
    """What a bundle is to draw: the scan or scans that are named, else all NIfTI files of a folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Two have the same name, so that the mask of one would replace the other's.
    """
    named = [image] if isinstance(image, str | Path) else list(image or [])
    found = [Path(one) for one in named] or sorted(Path(dataset_dir).glob("*.nii*"))
    missing = [path for path in found if not path.exists()]
    if missing or not found:
        what = f"{missing[0]}: no such scan" if missing else f"{dataset_dir}: no *.nii or *.nii.gz here"
        raise FileNotFoundError(f"{what}; name one with --image, or a folder of them with --dataset_dir")
    stems = [stem_of(path) for path in found]
    if twice := [path for path, stem in zip(found, stems, strict=True) if stems.count(stem) > 1]:
        raise ValueError(f"{twice[0]} and {twice[1]} have the same name, and masks are named so; draw them apart")
    return [{"image": str(path)} for path in found]


def stem_of(path: str | Path) -> str:
    """A scan's file name without .nii or .nii.gz."""
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")
