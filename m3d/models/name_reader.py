"""Who reads the names of structures for a mask head without a language model: the text tower beside its weights.

Two kinds stand in a head's folder as ``text_tower/``: that of a released SegVol (`m3d.models.name_tower`), and the text
side of our CLIP stage, with which `pretrain_segvol` has taught the head.
"""

# M = names, T = tokens, E = width of the shared space

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from encoders import VolumeTextCLIP
from m3d.models.clip import M3DCLIPConfig, Pair, without_pooler
from m3d.models.name_tower import SENTENCE, TEXT_TOWER, NameTower
from m3d.models.weights import put, read_weights, write_weights

OURS = ("text_tower.", "text_projection.")


class NameReader(Protocol):
    """What makes vectors of names."""

    def vectors(self, names: Sequence[str]) -> Tensor:
        """``(M, E)``, on the CPU."""

    def write(self, inside: Path) -> None:
        """Write it into a folder, made if missing."""


@dataclass(frozen=True, eq=False)
class PairNames:
    """The text side of a CLIP stage with its tokenizer."""

    model: VolumeTextCLIP
    config: M3DCLIPConfig
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, pair: Pair) -> "PairNames":
        """That of a whole pair."""
        return cls(pair.model, pair.config, pair.tokenizer)

    @classmethod
    def read(cls, inside: Path) -> "PairNames":
        """Read what `write` wrote.

        Raises:
            ValueError: The weights are not those of the config.
        """
        config = M3DCLIPConfig.from_pretrained(inside)
        model = VolumeTextCLIP(
            nn.Identity(),  # nobody looks at volumes here
            without_pooler(AutoModel.from_config(config.text)),
            vision_width=1,
            text_width=config.text.hidden_size,
            shared_width=config.shared_width,
            text_pooling=config.text_pooling,
        )
        put(model.text_tower, read_weights(inside, OURS[0]), f"{inside}: {OURS[0]}")
        put(model.text_projection, read_weights(inside, OURS[1]), f"{inside}: {OURS[1]}")
        return cls(model.eval(), config, AutoTokenizer.from_pretrained(inside, local_files_only=True))

    def write(self, inside: Path) -> None:
        """Write the text side into a folder, made if missing."""
        inside.mkdir(parents=True, exist_ok=True)
        state = {name: one.detach().cpu() for name, one in self.model.state_dict().items() if name.startswith(OURS)}
        write_weights(state, inside)
        self.config.save_pretrained(inside)
        self.tokenizer.save_pretrained(inside)

    @torch.no_grad()
    def vectors(self, names: Sequence[str]) -> Tensor:
        """Its vectors in the shared space, scaled to unit variance, as states are: ``(M, E)``."""
        texts = [SENTENCE.format(name) for name in names]
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        found = self.model.embed_texts(encoded["input_ids"], encoded["attention_mask"])
        scaled: Tensor = found * found.shape[-1] ** 0.5
        return scaled.float().cpu()


def read_name_reader(folder: Path) -> NameReader | None:
    """The reader that stands beside a head's weights, or None: it has learned names from a language model.

    Raises:
        ValueError: Its weights are not those of its config, or it is of no known kind.
    """
    inside = folder / TEXT_TOWER
    if not (inside / "config.json").is_file():
        return None
    kind = json.loads((inside / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind == M3DCLIPConfig.model_type:
        return PairNames.read(inside)
    if kind in ("clip_text_model", "clip"):
        return NameTower.read(folder)
    raise ValueError(f"{inside}: a text tower of kind {kind!r} is not known; known: m3d_clip, clip_text_model")
