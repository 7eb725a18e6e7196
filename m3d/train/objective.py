"""What is learned, by name: words, and the masks that words, points, boxes and earlier masks ask for."""

# M = masks asked for by [SEG], P = masks asked for by geometry, (D, H, W) = the model's grid

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3d.models import M3DForConditionalGeneration
from m3d.train.batches import Batch
from segvol_head import Prompts, bce_loss, dice_loss


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """The paper adds language, Dice and BCE with weights of 1 (section 4.2; REFERENCE A1.3)."""

    text: float = 1.0
    dice: float = 1.0
    bce: float = 1.0
    prompted: float = 0.5
    positive_share: float = 0.0


def balanced_bce(logits: Tensor, target: Tensor, positive_share: float) -> Tensor:
    """BCE whose positive voxels weigh ``positive_share`` of the grid's size: ``(M, 1, D, H, W)`` -> a number.

    0 is the paper's plain mean. A structure that fills a ten-thousandth of the grid is all but invisible to that mean,
    and Dice has no gradient while the mask is empty; a tenth lets both begin. An empty target keeps the plain mean.
    """
    if positive_share == 0:
        return bce_loss(logits, target)
    truth = target.float()
    count = truth.flatten(1).sum(dim=1).clamp(min=1)
    weight = (positive_share * truth[0].numel() / count).clamp(min=1).view(-1, 1, 1, 1, 1)
    return F.binary_cross_entropy_with_logits(logits.float(), truth, weight=torch.where(target, weight, 1.0))


class TalkAndDraw(nn.Module):
    """Losses of an instruction batch: ``text``, ``dice``, ``bce`` of every ``[SEG]``, and those of geometric prompts.

    ``simulated`` > 0 draws that many of a batch's masks once more from a box or clicks, and once more from that answer
    with a corrective click, as interactive segmentation is trained (SegVol, section 3.3; SAM, appendix A).
    """

    def __init__(self, model: M3DForConditionalGeneration, weights: LossWeights, simulated: int = 2) -> None:
        super().__init__()
        self.model, self.weights, self.simulated = model, weights, simulated

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is what is minimised."""
        out = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            pixel_values=batch.pixel_values,
            volume_index=batch.volume_index,
            draw_masks=True,
        )
        losses = {"text": self.weights.text * out.loss}
        if not len(batch.masks):
            losses["dice"] = 0.0 * out.mask_logits.sum()  # the head stays in the graph for DDP and ZeRO
            return losses
        losses["dice"] = self.weights.dice * dice_loss(out.mask_logits, batch.masks)
        losses["bce"] = self._bce(out.mask_logits, batch.masks)
        chosen = torch.randperm(len(batch.masks), generator=generator)[: self.simulated]
        chosen = chosen[batch.masks[chosen].flatten(1).any(dim=1).cpu()]
        if self.simulated and len(chosen):
            truth, owner = batch.masks[chosen], batch.mask_volume[chosen]
            prompts = simulate_prompts(truth, generator)
            logits = self.model.draw(out.volume_features, volume_index=owner, prompts=prompts)
            again = correct(prompts, logits.detach(), truth, generator)
            refined = self.model.draw(out.volume_features, volume_index=owner, prompts=again)
            drawn = [self.weights.dice * dice_loss(x, truth) + self._bce(x, truth) for x in (logits, refined)]
            losses["prompted"] = self.weights.prompted * sum(drawn) / 2
        return losses

    def _bce(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.weights.bce * balanced_bce(logits, target, self.weights.positive_share)


def pick(region: Tensor, generator: torch.Generator) -> Tensor:
    """One random voxel ``(3,)`` of a region ``(D, H, W)`` that is not empty."""
    where = region.nonzero()
    return where[int(torch.randint(len(where), (), generator=generator))].float()


def simulate_prompts(truth: Tensor, generator: torch.Generator) -> Prompts:
    """A box with jittered sides, a click inside, or both, for masks ``(P, 1, D, H, W)``."""
    kind = int(torch.randint(3, (), generator=generator))
    points = torch.stack([pick(mask[0], generator) for mask in truth])[:, None]
    boxes = []
    for mask in truth[:, 0]:
        where = mask.nonzero()
        jitter = torch.randint(-1, 2, (6,), generator=generator).to(where)
        sides = torch.cat([where.amin(0), where.amax(0)]) + jitter
        limit = torch.tensor([*mask.shape, *mask.shape], device=where.device) - 1
        boxes.append(torch.minimum(sides.clamp(min=0), limit).float())
    labels = torch.ones(len(truth), 1, device=truth.device)
    return Prompts(
        points=points if kind != 1 else None,
        point_labels=labels if kind != 1 else None,
        boxes=torch.stack(boxes) if kind != 0 else None,
    )


def correct(prompts: Prompts, logits: Tensor, truth: Tensor, generator: torch.Generator) -> Prompts:
    """Add a click where an answer is wrong, on the larger of missing and extra, and the answer as a mask prompt."""
    clicks, labels = [], []
    for mask, answer in zip(truth[:, 0], logits[:, 0] > 0, strict=True):
        missing, extra = mask & ~answer, answer & ~mask
        inside = bool(missing.sum() >= extra.sum())
        region = missing if inside else extra
        clicks.append(pick(region if bool(region.any()) else mask, generator))
        labels.append(1.0 if inside or not bool(region.any()) else 0.0)
    click, label = torch.stack(clicks)[:, None], torch.tensor(labels, device=truth.device)[:, None]
    if prompts.points is not None and prompts.point_labels is not None:
        click, label = torch.cat([prompts.points, click], 1), torch.cat([prompts.point_labels, label], 1)
    return Prompts(points=click, point_labels=label, boxes=prompts.boxes, mask=logits)
