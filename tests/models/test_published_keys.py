"""The published checkpoints' parameter names and shapes (not their values) load strictly after a pure renaming."""

import csv
import math
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, LlamaConfig

from encoders import ViT3D, VolumeTextCLIP
from encoders.published import rename
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DSegConfig, M3DVisionConfig
from m3d.models.published import rename_lamed

FOLDER = Path(__file__).parents[1] / "fixtures" / "keys"


def published(name: str) -> dict[str, torch.Tensor]:
    """A state dict on the meta device: names and shapes alone."""
    with (FOLDER / name).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    shapes = {row["key"]: [int(side) for side in row["shape"].split("x") if side.isdigit()] for row in rows}
    for row in rows:
        assert math.prod(shapes[row["key"]]) == int(row["numel"])
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_m3d_clip_loads_strictly():
    state = published("keys_m3dclip.tsv")
    with torch.device("meta"):
        model = VolumeTextCLIP(
            ViT3D(), BertModel(BertConfig()), vision_width=768, text_width=768, shared_width=768, raw_scale=True
        )
    renamed = rename(state)
    assert len(renamed) == len(state) == 342
    model.load_state_dict(renamed, strict=True, assign=True)


def test_m3d_clip_vision_tower_loads_strictly_alone():
    prefix = "vision_encoder."
    state = {k.removeprefix(prefix): v for k, v in published("keys_m3dclip.tsv").items() if k.startswith(prefix)}
    with torch.device("meta"):
        tower = ViT3D()
    tower.load_state_dict(rename(state), strict=True, assign=True)
    assert sum(p.numel() for p in tower.parameters()) == 87_389_184


def test_m3d_lamed_llama2_loads_strictly():
    state = published("keys_lamed_llama2.tsv")
    with torch.device("meta"):
        model = M3DForConditionalGeneration(
            M3DConfig(
                vision_config=M3DVisionConfig(),
                text_config=LlamaConfig(vocab_size=32004),
                seg_config=M3DSegConfig(encoder_config=M3DVisionConfig(cls_token=False), merge="mean"),
            )
        )
    renamed = rename_lamed(state)
    dropped = [key for key in state if "mask_downscaling" in key]  # dead 2-D convolutions of the reference
    assert len(renamed) == len(state) - len(dropped) == 713 - 10
    model.load_state_dict(renamed, strict=True, assign=True)
