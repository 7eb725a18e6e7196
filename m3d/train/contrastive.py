"""Which text belongs to which volume: the contrastive objective over the pairs of all processes, and how it is judged.

open_clip's losses gather the negatives. With ``local_loss`` and ``gather_with_grad`` each process compares its own rows
with everyone's columns and gradients flow back through the gathering, so the mean over processes that DDP and ZeRO take
is the loss, and the gradient, of one process on the joined batch (tested).
"""

# B = pairs of a process, E = shared width, n = volumes (and texts) of an evaluation

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch.distributed as dist
from open_clip.loss import ClipLoss, SigLipLoss  # type: ignore[import-untyped]
from torch import Tensor, nn

from encoders import VolumeTextCLIP
from m3d.train.kept_tokens import KeptTokens, still
from m3d.train.objective import Loss

Kind = Literal["infonce", "siglip"]
START: Mapping[Kind, tuple[float, float | None]] = {  # scale and bias at the beginning
    "infonce": (1 / 0.07, None),  # CLIP, section 2.4
    "siglip": (10.0, -10.0),  # SigLIP, section 3.2
}


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """The loss, and how many volumes are in memory at once.

    ``chunk`` > 0 encodes a process's pairs that many at a time and encodes each chunk again on the way back: the exact
    gradient of the whole batch in the memory of a chunk, for one more forward pass. It stands in for gradient
    accumulation, whose micro-batches would not see each other's negatives.
    """

    kind: Kind = "infonce"
    chunk: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no loss or no size."""
        if self.kind not in START:
            raise ValueError(f"kind={self.kind!r} is not known; use infonce or siglip")
        if self.chunk < 0:
            raise ValueError(f"chunk={self.chunk} must be a number of volumes, or 0 for all at once")


def refuse_accumulation(batch: int, micro_batch: int, world_size: int) -> None:
    """Stop where a step's pairs would not be compared with each other.

    Raises:
        ValueError: The step would be several micro-batches.
    """
    if batch != micro_batch * world_size:
        raise ValueError(
            f"optim.batch={batch} would be {batch / (micro_batch * world_size):g} micro-batches of {micro_batch} on "
            f"{world_size} processes, but a contrastive step needs all its pairs at once: the pairs of one micro-batch "
            f"are the negatives of the others; set optim.micro_batch={batch // world_size}, and to fit it into memory "
            "loss.chunk to the volumes that do (same gradient, one more forward pass)"
        )


def pair_loss(kind: Kind, volumes: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The mean loss of this process's pairs ``(B, E)`` against those of all processes, of which each has B."""
    spread = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    loss: Tensor
    if kind == "siglip":
        loss = SigLipLoss(rank=rank, world_size=world_size)(volumes, texts, scale, bias)
    else:
        gathered = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
        loss = gathered(volumes, texts, scale)
    return loss


class ContrastivePair(nn.Module):
    """The one loss of a CLIP batch, ``contrastive``. Frozen towers stay in evaluation mode (no dropout).

    A vision tower that stands still looks at a named picture once.
    """

    whole_batch = True  # the trainer refuses accumulation; see `refuse_accumulation`

    def __init__(self, model: VolumeTextCLIP, config: ContrastiveConfig) -> None:
        super().__init__()
        if (config.kind == "siglip") != (model.logit_bias is not None):
            raise ValueError("SigLIP learns a bias and InfoNCE has none: build the pair with START[kind]")
        # DeepSpeed sends parameters as bytes, and a tensor without dimensions has none to view.
        model.log_scale = nn.Parameter(model.log_scale.detach().reshape(1))
        if model.logit_bias is not None:
            model.logit_bias = nn.Parameter(model.logit_bias.detach().reshape(1))
        self.model, self.config, self._kept = model, config, KeptTokens()

    def train(self, mode: bool = True) -> "ContrastivePair":
        """Set the mode, except that what is frozen stays as it is used."""
        super().train(mode)
        for tower in (self.model.vision_tower, self.model.text_tower):
            if still(tower):
                tower.eval()
        return self

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Loss]:
        """Compare ``pixel_values`` (B, 1, D, H, W) with ``input_ids`` (B, T); the total is over this process's B."""
        volumes, pictures, tower = batch["pixel_values"], batch.get("pictures") or [None], self.model.vision_tower
        if seen := still(tower) and None not in pictures:
            volumes = self._kept(tower, volumes, pictures)
        mean = self.model(  # as a module: under ZeRO-3 its own parameters are there only inside its forward
            volumes,
            batch["input_ids"],
            batch["attention_mask"],
            seen=seen,
            loss=partial(pair_loss, self.config.kind),
            chunk=self.config.chunk,
        )["contrastive"]
        return {"contrastive": Loss(mean * len(volumes), "pairs")}


def partner_ranks(similarity: Tensor) -> Tensor:
    """The rank of each row's own column, from 1; ties, and NaN, count against it: ``(n, n) -> (n,)``."""
    return (~(similarity < similarity.diagonal()[:, None])).sum(dim=1)


def retrieval_scores(similarity: Tensor, at: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Scores of both directions and of chance; text i is volume i's: ``(n, n)``, rows are volumes.

    ``R@k`` is the share of queries whose partner is among the k best, ``MRR`` the mean of 1 / rank. Ties count against
    the model (`partner_ranks`), so that one which answers everything alike scores worst.
    """
    n = len(similarity)
    scores: dict[str, float] = {"n": n}
    for name, rows in (("volume_to_text", similarity), ("text_to_volume", similarity.T)):
        ranks = partner_ranks(rows).double()
        scores |= {f"{name}/R@{k}": (ranks <= k).double().mean().item() for k in at}
        scores |= {f"{name}/MRR": (1 / ranks).mean().item()}
        scores |= {f"{name}/mean_rank": ranks.mean().item(), f"{name}/median_rank": ranks.quantile(0.5).item()}
    scores |= {f"chance/R@{k}": min(1.0, k / n) for k in at}
    return scores | {"chance/MRR": sum(1 / rank for rank in range(1, n + 1)) / n, "chance/mean_rank": (n + 1) / 2}
