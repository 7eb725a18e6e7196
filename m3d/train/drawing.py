"""Segmentation pretraining: every structure is asked for by its name, by clicks and boxes, and by both.

Names are vectors that never learn, made once. What a language model will say when it asks for a mask is the state that
predicts ``[SEG]`` (`m3d.models.seg_token`); so a name is read here by that same model, in the same wording, and its
state is taken at that same place. ``seg_projector`` and the head then know such states before instruction begins. With
the text tower of the CLIP stage in its place (as SegVol has CLIP's, REFERENCE A1.4), the head learns to follow vectors
of names all the same, and ``seg_projector`` begins anew in instruction.
"""

# V = volumes, M = masks asked for by name, P = those asked for by geometry, K = names, R = wordings, E = their width

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m3d.models.name_reader import NameReader
from m3d.models.processing import encode_exchange
from m3d.models.seg_token import find_seg_tokens, seg_states
from m3d.models.segvol import PromptedSegVol
from m3d.tasks.naming import SEG
from m3d.tasks.wordings import Phrases
from m3d.train.collate import collate_masks
from m3d.train.objective import Loss, LossWeights, balanced_bce, prompted_loss
from m3d.train.views import Drawn
from segvol_head import ImageFeatures, Prompts, dice_loss


@dataclass(frozen=True, kw_only=True)
class MaskCollator:
    """`collate_masks`, and the number of the optimizer step as ``turn``: all ranks simulate one kind of prompt.

    Masks without a name stand apart, as ``pseudo`` of the volumes ``pseudo_volume``.
    """

    global_batch: int = 1

    def __call__(self, items: Sequence[Drawn]) -> dict[str, Any]:
        """The batch of some volumes; ``prompted`` counts the masks with a name that are not empty."""
        batch = collate_masks(items)
        batch["turn"] = min(item.index for item in items) // self.global_batch
        named = torch.tensor([bool(name) for name in batch["names"]], dtype=torch.bool)
        batch["pseudo"], batch["pseudo_volume"] = batch["masks"][~named], batch["mask_volume"][~named]
        batch["masks"], batch["mask_volume"] = batch["masks"][named], batch["mask_volume"][named]
        batch["names"] = list(filter(None, batch["names"]))
        filled = int(batch["masks"].flatten(1).any(dim=1).sum())
        batch["counts"] |= {"masks": len(batch["names"]), "prompted": filled, "pseudo": len(batch["pseudo"])}
        return batch


class NameVectors(nn.Module):
    """Vectors of names, in one or more wordings: ``(K, R, E)``. They are no parameters and not saved."""

    vectors: Tensor

    def __init__(self, names: Sequence[str], vectors: Tensor) -> None:
        super().__init__()
        if vectors.ndim != 3 or len(vectors) != len(names):
            raise ValueError(f"{len(names)} names need vectors (K, R, E), got {tuple(vectors.shape)}")
        self.index = {name: number for number, name in enumerate(names)}
        self.register_buffer("vectors", vectors, persistent=False)

    def forward(self, names: Sequence[str], seed: int) -> Tensor:
        """A wording of each, drawn by ``seed``: ``(M, E)``.

        Raises:
            ValueError: There is no vector for a name.
        """
        unknown = sorted(set(names) - self.index.keys())
        if unknown:
            raise ValueError(f"no vector for the name {unknown[0]!r}; names are collected from the stores at the start")
        rng = random.Random(f"{seed}/wordings")
        chosen = [rng.randrange(self.vectors.shape[1]) for _ in names]
        return self.vectors[[self.index[name] for name in names], chosen]


@torch.no_grad()
def language_vectors(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], *, wordings: int = 4
) -> NameVectors:
    """The states with which a language model will ask for each name: those that predict ``[SEG]``.

    They are those of the exchange without its volume, which it has not seen yet.
    """
    seg = tokenizer.convert_tokens_to_ids(SEG)
    assert isinstance(seg, int)
    found = []
    for name in names:
        for number in range(wordings):
            say = Phrases("en", random.Random(f"{name}/{number}"))
            prompt = say("seg.sem", "prompt", names=say.join([say.named(name)]))
            answer = say("seg.sem", "answer", masks=say.join([f"{name} {SEG}"]))
            ids = torch.tensor([encode_exchange(tokenizer, prompt, answer)[0]], device=language_model.device)
            where = find_seg_tokens(ids, seg)
            assert len(where) == 1
            ids = ids[:, : int(where.positions[0])]  # a model that does not know the token yet never reads it
            states = language_model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            found.append(seg_states(states, where)[0].float().cpu())
    return NameVectors(names, torch.stack(found).unflatten(0, (len(names), wordings)))


def read_vectors(reader: NameReader, names: Sequence[str]) -> NameVectors:
    """What a text tower makes of each name, in its one wording."""
    return NameVectors(names, reader.vectors(names)[:, None])


class DrawByPrompts(nn.Module):
    """Losses of a segmentation batch; each volume is encoded once for all that is asked about it.

    ``dice`` and ``bce`` are those of masks asked for by name, also of such as are certainly absent (an empty mask).
    ``prompted`` are those that are there, asked for by a click, a box or both, with or without the name beside them, in
    turn by step; and once more with that answer as a prompt and a click where it is wrong.

    With probability ``detail_dropout`` a volume's detail path is silent: it would else learn to draw alone, and the
    vision tower, whose tokens the language model will read, would learn nothing.

    ``pseudo`` is as ``prompted``, of masks that have no name, weighted by ``pseudo_weight``; None where there are none.
    """

    def __init__(
        self,
        model: PromptedSegVol,
        names: NameVectors,
        weights: LossWeights,
        *,
        detail_dropout: float = 0.25,
        pseudo_weight: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= detail_dropout < 1:
            raise ValueError(f"detail_dropout={detail_dropout} must be a probability below 1")
        self.model, self.names, self.weights, self.detail_dropout = model, names, weights, detail_dropout
        self.pseudo_weight = pseudo_weight
        self.loss_names = (
            ("dice", "bce", "prompted") if pseudo_weight is None else ("dice", "bce", "prompted", "pseudo")
        )

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Loss]:
        """Sums over masks, by name; every rank runs the same modules, whatever its batch holds."""
        features = self._quieted(self.model.look(batch["pixel_values"]), batch["seed"])
        masks, owner, names = batch["masks"], batch["mask_volume"], batch["names"]
        if real := len(names) > 0:
            vectors = self.names(names, batch["seed"])
        else:  # something is drawn that weighs nothing
            masks, owner = masks.new_zeros(1, *batch["pixel_values"].shape[1:]), owner.new_zeros(1)
            vectors = self.names.vectors[:1, 0]
        logits = self.model.draw(features, owner, names=vectors)
        weigh = self.weights
        losses = {
            "dice": Loss(real * dice_loss(logits, masks, reduction="none").sum(), "masks", weigh.dice),
            "bce": Loss(real * balanced_bce(logits, masks, weigh.positive_share).sum(), "masks", weigh.bce),
        }
        if weigh.prompted > 0:
            losses["prompted"] = Loss(
                self._prompted(features, masks, owner, vectors, batch), "prompted", self.weights.prompted
            )
        if self.pseudo_weight is not None:
            masks, owner = batch["pseudo"], batch["pseudo_volume"]
            if not len(masks):
                masks, owner = masks.new_zeros(1, *batch["pixel_values"].shape[1:]), owner.new_zeros(1)
            losses["pseudo"] = Loss(self._prompted(features, masks, owner, None, batch), "pseudo", self.pseudo_weight)
        return losses

    def _prompted(
        self, features: ImageFeatures, masks: Tensor, owner: Tensor, vectors: Tensor | None, batch: Mapping[str, Any]
    ) -> Tensor:
        """The mean of a first answer and a corrected one, summed over the masks that are not empty.

        Without ``vectors`` of names, a turn of name and click is one of the click alone.
        """
        there = masks.flatten(1).any(dim=1)
        real = bool(there.any())
        chosen = there if real else torch.arange(len(there), device=there.device) == 0
        truth, owner = masks[chosen] if real else torch.ones_like(masks[:1]), owner[chosen]
        names = None if vectors is None else vectors[chosen]
        takes_masks = self.model.seg_head.prompt_encoder.mask_embedding is not None

        def draw(prompts: Prompts, named: bool) -> Tensor:
            taken = prompts if takes_masks else replace(prompts, mask=None)
            return self.model.draw(features, owner, names=names if named else None, prompts=taken)

        drawn = prompted_loss(draw, truth, _seeds(batch["seed"], len(truth)), int(batch["turn"]), self.weights)
        return real * drawn

    def _quieted(self, features: ImageFeatures, seed: int) -> ImageFeatures:
        if features.detail is None or not self.training or self.detail_dropout == 0:
            return features
        generator = torch.Generator().manual_seed(seed)
        heard = torch.rand(len(features.detail), generator=generator) >= self.detail_dropout
        return replace(features, detail=features.detail * heard.to(features.detail)[:, None, None, None, None])


def _seeds(seed: int, number: int) -> list[int]:
    rng = random.Random(f"{seed}/prompts")
    return [rng.getrandbits(62) for _ in range(number)]
