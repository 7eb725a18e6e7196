"""A MONAI bundle of the mask head: ``python -m monai.bundle run`` draws a scan's structures without a language model.

::

    configs/metadata.json inference.json logging.conf
    models/config.json model.safetensors preprocess.json
    docs/README.md LICENSE m3d_export.json

The specification asks for a pickled ``models/model.pt``; weights are safetensors here, which the network itself reads.
"""

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

import m3d
from data_prep.preprocess import Preprocess
from m3d.export.folders import mark, whole_folder, write_json
from m3d.export.in_monai import VECTORS
from m3d.export.reference import Exported
from m3d.models import M3DForConditionalGeneration, M3DProcessor
from m3d.models.segvol import HANDED_OVER, M3DSegVolConfig
from m3d.models.weights import read_weights, write_weights
from m3d.train.drawing import language_vectors

WORDINGS = 8
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
NEEDS = ("nibabel", "transformers", "einops", "safetensors", "pytorch-ignite", "fire")
HERE = "m3d.export.in_monai"
LOGGING = """\
[loggers]
keys=root

[handlers]
keys=console

[formatters]
keys=line

[logger_root]
level=INFO
handlers=console

[handler_console]
class=StreamHandler
level=INFO
formatter=line
args=(sys.stdout,)

[formatter_line]
format=%(asctime)s %(levelname)s %(name)s: %(message)s
"""


def export_bundle(source: Path, folder: Path, structures: Sequence[str], *, force: bool = False) -> Exported:
    """A model's mask head, with a vector for each of ``structures``, as a bundle.

    Without structures it draws what is pointed at and nothing else.

    Raises:
        ValueError: The model has no mask head, or no language model to read names with, or a name is given twice.
    """
    names = [name.strip() for name in structures if name.strip()]
    if len(set(names)) != len(names):
        raise ValueError(f"--structures names one twice: {', '.join(names)}")
    if odd := [name for name in names if name.startswith(("$", "@", "%"))]:
        raise ValueError(f"{odd[0]!r} is no name for a structure: MONAI would evaluate it; name others by --structures")
    config = M3DSegVolConfig.of(source)
    weights = _weights(source, config)
    weights[VECTORS] = _vectors(source, names, config.text_width)
    preprocess = Preprocess.read(source)
    with whole_folder(folder, force=force) as partial:
        for part in ("configs", "models", "docs"):
            (partial / part).mkdir()
        write_weights(weights, partial / "models")
        config.structures = names
        config.save_pretrained(partial / "models")
        preprocess.write(partial / "models")
        write_json(partial / "configs" / "metadata.json", _metadata(source, config, names))
        write_json(partial / "configs" / "inference.json", inference_config(names))
        (partial / "configs" / "logging.conf").write_text(LOGGING, encoding="utf-8")
        notes = _notes(names)
        (partial / "docs" / "README.md").write_text(_readme(source.name, names, notes), encoding="utf-8")
        (partial / "LICENSE").write_text(licence(), encoding="utf-8")
        mark(partial, source, "monai-bundle", structures=names, notes=notes)
    return Exported(folder, len(weights), tuple(notes))


def inference_config(names: Sequence[str]) -> dict[str, Any]:
    """``inference.json``: whatever stands on the first level can be given on the command line."""
    return {
        "imports": [f"$import {HERE} as in_monai"],
        "bundle_root": ".",
        "image": None,
        "dataset_dir": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "structures": list(names),
        "points": None,
        "box": None,
        "frame": "voxel",
        "separate": False,
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": f"{HERE}.read_network",
            "folder": "$@bundle_root + '/models'",
            "structures": "@structures",
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
                {
                    "_target_": f"{HERE}.Preparedd",
                    "keys": "image",
                    "preprocess": "$@bundle_root + '/models/preprocess.json'",
                    "points": "@points",
                    "box": "@box",
                    "frame": "@frame",
                },
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$in_monai.scans(@image, @dataset_dir)",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": f"{HERE}.OnScand", "keys": "pred", "separate": "@separate"},
                {
                    "_target_": f"{HERE}.WriteMasksd",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "structures": "@structures",
                },
            ],
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "prepare_batch": "$in_monai.prepare_batch",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }


def _weights(source: Path, config: M3DSegVolConfig) -> dict[str, Tensor]:
    """Of the parts that draw alone, by their names in `NamedSegVol`, in the type in which they are stored."""
    state: dict[str, Tensor] = {}
    for part in HANDED_OVER:
        if part != "vision_tower" or config.seg.encoder is None:
            state |= {f"segvol.{part}.{name}": one for name, one in read_weights(source, f"{part}.").items()}
    return state


@torch.no_grad()
def _vectors(source: Path, names: Sequence[str], width: int) -> Tensor:
    """What the language model would ask with for each name, without a volume: ``(K, E)``, the mean of some wordings."""
    if not names:
        return torch.zeros(0, width)
    kind = AutoConfig.from_pretrained(source, local_files_only=True).model_type
    if kind != "m3d":
        raise ValueError(f"{source.name} has no language model to read --structures with; leave them out, and point")
    model: Any = M3DForConditionalGeneration.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    tokenizer = M3DProcessor.from_pretrained(source).tokenizer
    return language_vectors(model.eval().language_model, tokenizer, names, wordings=WORDINGS).vectors.mean(dim=1)


def _metadata(source: Path, config: M3DSegVolConfig, names: Sequence[str]) -> dict[str, Any]:
    """What the bundle's schema asks for."""
    described = {"image": {"type": "image", "format": "hounsfield", "modality": "CT", "num_channels": 1}}
    shape = config.vision.image_size if config.seg.encoder is None else config.seg.encoder.image_size
    common = {"spatial_shape": list(shape or ()), "dtype": "float32", "is_patch_data": False}
    drawn = list(names) or ["what is pointed at"]
    return {
        "schema": SCHEMA,
        "version": m3d.__version__,
        "changelog": {m3d.__version__: "written by m3d export"},
        "monai_version": _version("monai"),
        "pytorch_version": _version("torch").partition("+")[0],
        "numpy_version": _version("numpy"),
        "required_packages_version": {
            "m3d-lamed": m3d.__version__,
            **{name: version for name in NEEDS if (version := _version(name))},
        },
        "name": f"{source.name}, mask head",
        "task": f"Segmentation of {', '.join(drawn)}",
        "description": "The promptable mask head of an M3D model: structures by name, by points, by a box, or together",
        "authors": "The M3D authors",
        "copyright": "The M3D authors; Apache-2.0",
        "intended_use": "Research. Not for clinical use, not for diagnosis",
        "data_source": "see the model card of the model it was made of",
        "data_type": "nifti",
        "image_classes": "one channel, prepared as models/preprocess.json says, in [0, 1]",
        "pred_classes": "a channel of logits for each structure, above 0 inside",
        "references": ["https://arxiv.org/abs/2404.00578", "https://arxiv.org/abs/2311.13385"],
        "network_data_format": {
            "inputs": {"image": {**described["image"], **common, "value_range": [0, 1], "channel_def": {"0": "image"}}},
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "classes",
                    "num_channels": len(drawn),
                    **common,
                    "value_range": [],
                    "channel_def": {str(number): name for number, name in enumerate(drawn)},
                }
            },
        },
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def licence() -> str:
    """The licence under which this package, and what is made of it, may be used."""
    for file in metadata.files("m3d-lamed") or []:
        if file.name == "LICENSE":
            return str(file.read_text())
    return (Path(m3d.__file__ or "").parents[1] / "LICENSE").read_text(encoding="utf-8")  # a checkout


def _notes(names: Sequence[str]) -> list[str]:
    if not names:
        return ["it was made without names: it draws what points or a box show, with --structures [] as it is"]
    return [
        "there is no language model in it: names are vectors that were read without a volume, the mean of "
        f"{WORDINGS} wordings, so that its masks differ a little from those of m3d segment",
        "of points and boxes its masks are those of m3d segment",
    ]


def _readme(name: str, names: Sequence[str], notes: Sequence[str]) -> str:
    command = "python -m monai.bundle run --config_file configs/inference.json --bundle_root . --image ct.nii.gz"
    asked = ["", f"--structures \"['{names[0]}']\""] if names else []
    asked += [
        '--structures "[]" --points "[[40, 61, 64, 1], [40, 80, 64, 0]]"',
        '--structures "[]" --box "[20, 30, 35, 60, 70, 95]"',
    ]
    return README.format(
        name=name,
        commands="\n".join(f"{command} {more}".rstrip() for more in asked),
        structures=json.dumps(list(names)),
        notes="\n".join(f"- {note}" for note in notes),
    )


README = """\
# The mask head of {name} as a MONAI bundle

It needs `pip install 'm3d-lamed[bundle]'`. In this folder:

```
{commands}
```

`structures` is `{structures}` unless given. The result is `eval/ct_seg.nii.gz` on the scan's own grid: k where
the k-th structure is drawn; what several share goes to the one of the highest logit. With `--separate True` each has a
file of its own. `image` may be a list; without it all `*.nii.gz` of the folder `dataset_dir` are drawn. Points are
`[i, j, l, label]`, label 1 inside and 0 outside; a box ends before its upper corner; both in the scan's voxels, or with
`--frame mm` in patient coordinates (RAS).

What to know:

{notes}

Weights are safetensors, not the pickled `models/model.pt` of the specification. For research, not for clinical use.
"""


def structures_of(source: Path, given: str | None) -> list[str]:
    """The names that are given, else those that the model says it was taught.

    Raises:
        ValueError: It does not say, and none are given.
    """
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    taught = getattr(M3DSegVolConfig.of(source).seg, "vocabulary", None)
    if not taught:
        raise ValueError(
            f'{source.name} does not say what it was taught to draw: give --structures "mandible,spinal cord", or '
            '--structures "" for a bundle that draws what is pointed at'
        )
    return list(taught)
