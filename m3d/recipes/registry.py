"""Which recipe a config is for: its ``stage`` key, and what each stage is; a recipe is imported when it is chosen."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from m3d.config import config_root, find_config, hint, read_config


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage's module, what it does, and where its published numbers stand."""

    module: str
    does: str
    source: str


STAGES: Mapping[str, Stage] = {
    "pretrain_clip": Stage(
        module="m3d.recipes.pretrain_clip",
        does="3D ViT and text tower agree on which report belongs to which scan (InfoNCE or SigLIP)",
        source="M3D 4.1; train_CLIP.py",
    ),
    "pretrain_segvol": Stage(
        module="m3d.recipes.pretrain_segvol",
        does="the mask head draws what names, points and boxes ask for (Dice + BCE)",
        source="SegVol 3; SegVol train.py",
    ),
    "pretrain_words": Stage(
        module="m3d.recipes.pretrain_words",
        does="a language model from nothing reads the texts alone; for small models, not published",
        source="ours",
    ),
    "take_words": Stage(
        module="m3d.recipes.take_words",
        does="a pretrained language model out of a Python package, as a plain folder",
        source="ours; SmolLM2",
    ),
    "align": Stage(
        module="m3d.recipes.align",
        does="perceiver and new tokens learn to speak to a frozen language model",
        source="M3D 4.2, stage 1; pretrain.sh",
    ),
    "instruct": Stage(
        module="m3d.recipes.instruct",
        does="all parts together, LoRA in the language model, tasks mixed by weight (language + Dice + BCE)",
        source="M3D 4.2, stage 2; finetune_lora.sh",
    ),
    "finetune": Stage(
        module="m3d.recipes.finetune",
        does="a checkpoint learns the structures of your own folder in nnU-Net's layout, measured before and after",
        source="ours",
    ),
    "merge": Stage(
        module="m3d.recipes.merge",
        does="folds LoRA and learned rows into a plain Hugging Face folder",
        source="merge_lora_weights_and_save_hf_model.py",
    ),
    "chain": Stage(
        module="m3d.recipes.chain", does="runs stages in order and skips what is done", source="M3D 4.2, figure 3"
    ),
}


class Recipe(Protocol):
    """What a recipe's module has: a frozen dataclass, and what runs it."""

    Config: type[Any]

    def main(self, config: Any, *, resume: bool = False) -> object:  # noqa: ANN401 - each recipe has its own
        """Run the stage."""


def place_of(path: str | Path) -> Path:
    """The folder that a config lies in; that of the shipped ones for their names."""
    return find_config(Path(path)).parent


def sizes_alone(folder: str | Path) -> Path | None:
    """The shipped folder ``language_models/NAME`` that a name means, wherever a chain has put its root before it."""
    shipped = config_root().joinpath(*Path(folder).parts[-2:])
    return shipped if shipped.parent.name == "language_models" and (shipped / "config.json").is_file() else None


def read_values(path: str | Path) -> dict[str, Any]:
    """What a config says, with what it extends, not yet typed; shipped ones are found by their name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no YAML of keys and values.
    """
    return read_config(find_config(Path(path)))


def stage_of(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """The stage of a config, or of an override ``stage=...``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no stage, or one that is not known.
    """
    values = read_values(path)
    given = [override.removeprefix("stage=") for override in overrides if override.startswith("stage=")]
    stage = given[-1] if given else values.get("stage")
    if not isinstance(stage, str):
        raise ValueError(f"{path} has no `stage:`; add one of {', '.join(STAGES)}")
    if stage not in STAGES:
        raise ValueError(f"{path}: stage={stage!r} is not known; {hint(stage, STAGES)}")
    return stage


def recipe(stage: str) -> Recipe:
    """Import a stage's module.

    Raises:
        ValueError: The stage is not known.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} is not known; {hint(stage, STAGES)}")
    module: Any = importlib.import_module(STAGES[stage].module)
    return module  # type: ignore[no-any-return]
