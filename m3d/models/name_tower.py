"""The text tower that came with a released SegVol: what it makes of a structure's name, the head is prompted with."""

# M = names, T = tokens, E = width of the tower

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from m3d.models.weights import put, read_weights, write_weights

TEXT_TOWER = "text_tower"
SENTENCE = "A computerized tomography of a {}."
"""SegVol's own wording of a name (its released code; section 3 of the paper)."""


@dataclass(frozen=True, eq=False)
class NameTower:
    """CLIP's text tower with its tokenizer."""

    model: CLIPTextModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def read(cls, folder: Path) -> "NameTower":
        """The tower that stands in a converted SegVol's folder.

        Raises:
            FileNotFoundError: There is none.
            ValueError: Its weights are not those of its config.
        """
        inside = folder / TEXT_TOWER
        if not (inside / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no {TEXT_TOWER}: it reads no names; prompt it by points and boxes")
        model = CLIPTextModel(CLIPTextConfig.from_pretrained(inside))
        put(model, read_weights(inside), str(inside))
        return cls(model.eval(), AutoTokenizer.from_pretrained(inside, local_files_only=True))

    @torch.no_grad()
    def vectors(self, names: Sequence[str]) -> Tensor:
        """What it makes of names: ``(M, E)``, the state at each sentence's end."""
        encoded = self.tokenizer([SENTENCE.format(name) for name in names], return_tensors="pt", padding=True)
        return self.pooled(encoded["input_ids"], encoded["attention_mask"])

    @torch.no_grad()
    def pooled(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``(M, T) -> (M, E)``."""
        states: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return states

    def write(self, inside: Path) -> None:
        """Write it into a folder, made if missing."""
        inside.mkdir(parents=True, exist_ok=True)
        write_weights(self.model.state_dict(), inside)
        self.model.config.save_pretrained(inside)
        self.tokenizer.save_pretrained(inside)
