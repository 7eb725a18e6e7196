"""LoRA and learned rows into plain tensors: one Hugging Face folder that ``m3d.load`` reads, and nothing beside it.

``m3d train configs/tiny/merge.yaml``. It works on whole tensors in files, wherever they were trained, and refuses
shards; the folder is there when all of it is written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from m3d.recipes.checkpoints import begin_manifest, model_folder, read_manifest, write_manifest, write_recipe
from m3d.recipes.handover import LOW_RANK_CONFIG, load_model, read_lora, save_model
from m3d.train import engines
from m3d.train.checkpoints import replacing

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything the stage can be told.

    Attributes:
        checkpoint: The output of a stage, or its ``model``.
        language_model: Folder of the language model, where the checkpoint left it out.
        output: The folder to write; its name becomes the model's.
        dtype: Of the weights that are written.
        notes: Further facts for the manifest, such as what is true of the texts.
    """

    stage: Literal["merge"] = "merge"
    checkpoint: str
    language_model: str | None = None
    output: str = "runs/merged"
    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    notes: dict[str, str] | None = None

    def parents(self) -> dict[str, str | None]:
        """The folders that it begins from."""
        return {"checkpoint": self.checkpoint, "language_model": self.language_model}


def main(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Fold, write, and say where it came from; the manifest."""
    if engines.rank() != 0:
        return {}
    folder, output = model_folder(config.checkpoint), Path(config.output)
    base = model_folder(config.language_model) if config.language_model is not None else None
    model, processor = load_model(folder, language_model=base, dtype=_read_as(config.dtype))
    lora = read_lora(folder)[0] if (folder / LOW_RANK_CONFIG).is_file() else None
    came_from = read_manifest(folder) or {}
    facts = begin_manifest(config, parents=config.parents()) | {
        "final": True,
        "name": output.name,
        "kind": "whole",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": came_from.get("seed"),
        "learned_from": came_from.get("data", []),
        "metrics": came_from.get("metrics", {}),
        "notes": config.notes or {},
    }
    with replacing(output) as partial:
        save_model(partial, model, processor, lora=lora, dtype=DTYPES[config.dtype])
        write_recipe(partial, config)
        write_manifest(partial, facts)
    return facts


def _read_as(dtype: str) -> torch.dtype:
    """A language model that is written in bfloat16 is read so, in half the memory; anything finer in float32."""
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32
