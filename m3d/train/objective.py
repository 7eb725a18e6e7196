"""What is learned, by name: words, and the masks that words, points, boxes and earlier masks ask for."""

# B = rows of text, T = tokens, M = masks asked for by [SEG], P = masks asked for by geometry, (D, H, W) = model's grid

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3d.models import M3DForConditionalGeneration
from m3d.models.box_head import number_reader, read_boxes
from m3d.models.modeling import M3DVolumeFeatures
from m3d.models.processing import IGNORED
from m3d.models.seg_token import SegTokens, find_seg_tokens
from m3d.train.anchors import Anchors
from m3d.train.kept_tokens import KeptTokens, still
from segvol_head import Prompts, bce_loss, dice_loss

KINDS = ("click", "box", "click and box", "name and click", "name and box")


@dataclass(frozen=True)
class Loss:
    """One part of what is minimised: a SUM over items, and what these are.

    The trainer divides ``total`` by ``batch["counts"][count]`` summed over all ranks and micro-batches of the optimizer
    step, so that it matters to nobody how the items were dealt out. ``weight`` belongs to the minimised sum alone; logs
    show the loss without it.
    """

    total: Tensor
    count: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """The paper adds language, Dice and BCE with weights of 1 (section 4.2; REFERENCE A1.3).

    Four are ours. ``prompted``: masks from clicks and boxes, with and without a name beside them. Where it, ``dice``
    and ``bce`` are all 0, nothing is drawn. ``boxes`` and ``values``: the state at ``<bx_start>`` gives the box in
    numbers as well as in digits, and the state before an answer what was measured. Digits and letters tell a language
    model from nothing little of where to look: without this it learned every usual answer and never looked.
    ``anchor``: what a ``[SEG]`` says to the head stays what it was at the beginning (`m3d.train.anchors`).
    """

    text: float = 1.0
    dice: float = 1.0
    bce: float = 1.0
    prompted: float = 0.5
    boxes: float = 0.0
    values: float = 0.0
    anchor: float = 0.0
    positive_share: float = 0.0


def text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of learned tokens: ``(B, U, V)`` and the tokens that they predict, ``(B, U)``."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def balanced_bce(logits: Tensor, target: Tensor, positive_share: float) -> Tensor:
    """BCE whose positive voxels weigh ``positive_share`` of the grid's size, a mask: ``(M, 1, D, H, W) -> (M,)``.

    0 is the paper's plain mean. A structure that fills a ten-thousandth of the grid is all but invisible to that mean,
    and Dice has no gradient while the mask is empty; a tenth lets both begin. An empty target keeps the plain mean.
    """
    if positive_share == 0:
        return bce_loss(logits, target, reduction="none")
    truth = target.float().flatten(1)
    count = truth.sum(dim=1, keepdim=True).clamp(min=1)
    weight = torch.where(target.flatten(1), (positive_share * truth.shape[1] / count).clamp(min=1), 1.0)
    with torch.autocast(logits.device.type, enabled=False):
        voxels = F.binary_cross_entropy_with_logits(logits.float().flatten(1), truth, weight=weight, reduction="none")
        return voxels.mean(dim=1)


class TalkAndDraw(nn.Module):
    """Losses of an instruction batch: ``text``, ``dice`` and ``bce`` of every ``[SEG]``, and ``prompted`` ones.

    The batch's ``prompted`` masks are drawn again from a click, a box or both, alone or beside the name's ``[SEG]``,
    and once more from that answer with a corrective click, as interactive segmentation is trained (SegVol, section 3.3;
    SAM, appendix A). Every rank runs the same modules in the same order whatever its batch holds: where there is
    nothing to draw, something is drawn that weighs nothing. DDP and ZeRO need that.
    """

    def __init__(
        self, model: M3DForConditionalGeneration, weights: LossWeights, anchors: Anchors | None = None
    ) -> None:
        super().__init__()
        self.model, self.weights, self.anchors = model, weights, anchors
        if (weights.anchor > 0) != (anchors is not None):
            raise ValueError(f"loss.anchor={weights.anchor} needs anchors where it is above 0, and there only")
        self.draws = model.seg_head is not None and max(weights.dice, weights.bce, weights.prompted) > 0
        if self.draws and model.merge != "each":
            raise ValueError('seg_config.merge="mean" draws one mask a row and cannot learn several; train with "each"')
        width = model.config.text.hidden_size
        if weights.boxes > 0 and model.box_head is None:
            raise ValueError("loss.boxes needs a model with a box head: begin with init.box_head=true, or set it to 0")
        self.value_reader = number_reader(width, 1) if weights.values > 0 else None
        self._kept = KeptTokens()
        read = [name for name in ("boxes", "values") if getattr(weights, name) > 0]
        anchored = ("anchor",) if anchors is not None else ()
        self.loss_names = ("text", *read, *anchored, *(("dice", "bce", "prompted") if self.draws else ()))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Loss]:
        """Sums by name; `Loss` says what the trainer divides them by."""
        following = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # what each position predicts
        read = (following != IGNORED).any(dim=0).nonzero().flatten()
        read = read if len(read) else read.new_zeros(1)  # the output projection stays in the graph
        out = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch.get("position_ids"),
            mm_encoder_outputs={"image": self._look(batch)},
            volume_index=batch["volume_index"],
            logits_to_keep=read,  # no logits where nothing is learned
            output_hidden_states=len(self.loss_names) > 1,
            use_cache=False,
        )
        losses = {"text": Loss(text_loss(out.logits, following[:, read]), "text", self.weights.text)}
        if self.weights.boxes > 0:
            losses["boxes"] = self._read_boxes(batch, out.hidden_states[-1])
        if self.value_reader is not None:
            losses["values"] = self._read_values(batch, out.hidden_states[-1])
        if self.anchors is not None:
            losses["anchor"] = self._anchor(batch, out.hidden_states[-1], self.anchors)
        if self.draws:
            losses |= self._draw(batch, out.hidden_states[-1], out.volume_features)
        return losses

    def _look(self, batch: Mapping[str, Any]) -> M3DVolumeFeatures:
        """The volumes' features; a tower that stands still looks at a named picture once."""
        pixels, pictures, tower = batch["pixel_values"], batch.get("pictures") or [None], self.model.vision_tower
        if self.draws or not still(tower) or None in pictures:
            return self.model.get_image_features(pixels)
        tokens = tower.without_cls(self._kept(tower, pixels, pictures))
        return M3DVolumeFeatures(pooler_output=self.model.perceiver(tokens))

    def _read_boxes(self, batch: Mapping[str, Any], hidden: Tensor) -> Loss:
        """Distance of the boxes that are read off the states at ``<bx_start>``: L1, in sides of the grid."""
        head = self.model.box_head
        assert head is not None
        rows, places = (batch["labels"] == self.model.config.box_start_token_id).nonzero(as_tuple=True)
        truth = batch["boxes"]
        if len(rows) != len(truth):
            raise ValueError(f"the answers begin {len(rows)} boxes, there are {len(truth)}; ids: {batch['ids']}")
        if not len(truth):  # every rank runs the same modules
            return Loss(0.0 * read_boxes(head, hidden[:1, 0]).sum(), "boxes", self.weights.boxes)
        read = read_boxes(head, hidden[rows, places])
        known = truth.isfinite().all(dim=1, keepdim=True)
        wrong = torch.where(known, (read - truth.nan_to_num()).abs(), 0.0)
        return Loss(wrong.mean(dim=1).sum(), "boxes", self.weights.boxes)

    def _read_values(self, batch: Mapping[str, Any], hidden: Tensor) -> Loss:
        """Distance of the measures that are read off the states before the answers: L1 of ``sign(v) log(1 + |v|)``."""
        assert self.value_reader is not None
        truth = batch["values"]
        if not len(truth):
            return Loss(0.0 * self.value_reader(hidden[:1, 0]).sum(), "values", self.weights.values)
        read = self.value_reader(hidden[batch["value_rows"], batch["value_places"]]).float()[:, 0]
        return Loss((read - truth.sign() * truth.abs().log1p()).abs().sum(), "values", self.weights.values)

    def _anchor(self, batch: Mapping[str, Any], hidden: Tensor, anchors: Anchors) -> Loss:
        """How far what each ``[SEG]`` says is from what it said of its name at the beginning."""
        where, names = find_seg_tokens(batch["input_ids"], self.model.config.seg_token_id), batch["names"]
        if len(where) != len(names):
            raise ValueError(f"the batch has {len(where)} [SEG] and {len(names)} names; ids: {', '.join(batch['ids'])}")
        if not names:  # every rank runs the same modules
            return Loss(0.0 * self.model.seg_prompts(hidden, _nowhere(where)).sum(), "masks", self.weights.anchor)
        return Loss(anchors(self.model.seg_prompts(hidden, where), names).sum(), "masks", self.weights.anchor)

    def _draw(self, batch: Mapping[str, Any], hidden: Tensor, features: M3DVolumeFeatures) -> dict[str, Loss]:
        where = find_seg_tokens(batch["input_ids"], self.model.config.seg_token_id)
        masks, owner = batch["masks"], batch["mask_volume"]
        if len(where) != len(masks):
            raise ValueError(f"the batch has {len(where)} [SEG] and {len(masks)} masks; ids: {', '.join(batch['ids'])}")
        if real := len(masks) > 0:
            text = self.model.seg_prompts(hidden, where)
        else:
            text = self.model.seg_prompts(hidden, _nowhere(where))
            masks, owner = masks.new_zeros(1, *batch["pixel_values"].shape[1:]), owner.new_zeros(1)
        logits = self.model.draw(features, text=text, volume_index=owner)
        weigh = self.weights
        losses = {
            "dice": Loss(real * dice_loss(logits, masks, reduction="none").sum(), "masks", weigh.dice),
            "bce": Loss(real * balanced_bce(logits, masks, weigh.positive_share).sum(), "masks", weigh.bce),
        }
        if weigh.prompted > 0 and "prompted" in batch:
            chosen, seeds = batch["prompted"], batch["prompt_seeds"]
            real, truth = len(chosen) > 0, masks[chosen]
            if not real:
                chosen, seeds, truth = chosen.new_zeros(1), [0], torch.ones_like(masks[:1])
            owner, text = owner[chosen], text[chosen]

            def draw(prompts: Prompts, named: bool) -> Tensor:
                return self.model.draw(
                    features, text=text if named else None, volume_index=owner, prompts=self._taken(prompts)
                )

            drawn = prompted_loss(draw, truth, seeds, batch["turn"], weigh)
            losses["prompted"] = Loss(real * drawn, "prompted", weigh.prompted)
        return losses

    def _taken(self, prompts: Prompts) -> Prompts:
        return prompts if takes_masks(self.model) else replace(prompts, mask=None)


def _nowhere(where: SegTokens) -> SegTokens:
    """The second token of the first row, as if it were a ``[SEG]``."""
    return SegTokens(where.rows.new_zeros(1), where.positions.new_ones(1))


def takes_masks(model: M3DForConditionalGeneration) -> bool:
    """Whether the head has a path for an earlier mask."""
    return model.seg_head is not None and model.seg_head.prompt_encoder.mask_embedding is not None


Draw = Callable[[Prompts, bool], Tensor]


def prompted_loss(draw: Draw, truth: Tensor, seeds: Sequence[int], turn: int, weigh: LossWeights) -> Tensor:
    """Draw masks ``(P, 1, D, H, W)`` from simulated prompts and from a correction: the mean, summed over the masks.

    ``draw`` gives logits for prompts, beside the names or without. The kind goes by ``turn``, the number of the
    optimizer step, so that it is the same on all ranks.
    """
    kind = KINDS[turn % len(KINDS)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompts = simulate_prompts(truth, generators, kind=kind)
    first = draw(prompts, "name" in kind)
    second = draw(correct(prompts, first.detach(), truth, generators), "name" in kind)
    return (mask_loss(first, truth, weigh) + mask_loss(second, truth, weigh)) / 2


def mask_loss(logits: Tensor, truth: Tensor, weigh: LossWeights) -> Tensor:
    """Dice and BCE by their weights, summed over masks ``(P, 1, D, H, W)``."""
    bce = balanced_bce(logits, truth, weigh.positive_share).sum()
    return weigh.dice * dice_loss(logits, truth, reduction="none").sum() + weigh.bce * bce


def pick(region: Tensor, generator: torch.Generator) -> Tensor:
    """One random voxel ``(3,)`` of a region ``(D, H, W)`` that is not empty."""
    where = region.nonzero()
    return where[int(torch.randint(len(where), (), generator=generator))].float()


def simulate_prompts(truth: Tensor, generators: Sequence[torch.Generator], *, kind: str) -> Prompts:
    """Clicks inside, boxes with jittered sides, or both, for masks ``(P, 1, D, H, W)``.

    Each has a generator of its own, so that a mask has its prompts whatever stands beside it. ``kind`` says which by
    its words ("click", "box").
    """
    each = list(zip(truth, generators, strict=True))
    points = labels = boxes = None
    if "click" in kind:
        points = torch.stack([pick(mask[0], generator) for mask, generator in each])[:, None]
        labels = torch.ones(len(truth), 1, device=truth.device)
    if "box" in kind:
        boxes = torch.stack([_box_around(mask[0], generator) for mask, generator in each])
    return Prompts(points=points, point_labels=labels, boxes=boxes)


def _box_around(mask: Tensor, generator: torch.Generator) -> Tensor:
    """First and last voxel of a mask along each axis, each side moved by at most one voxel: ``(D, H, W) -> (6,)``."""
    where = mask.nonzero()
    jitter = torch.randint(-1, 2, (6,), generator=generator).to(where)
    sides = torch.cat([where.amin(0), where.amax(0)]) + jitter
    limit = torch.tensor([*mask.shape, *mask.shape], device=where.device) - 1
    return torch.minimum(sides.clamp(min=0), limit).float()


def correct(prompts: Prompts, logits: Tensor, truth: Tensor, generators: Sequence[torch.Generator]) -> Prompts:
    """Add a click where an answer is wrong, on the larger of missing and extra, and the answer as a mask prompt."""
    clicks, labels = [], []
    for mask, answer, generator in zip(truth[:, 0], logits[:, 0] > 0, generators, strict=True):
        missing, extra = mask & ~answer, answer & ~mask
        inside = bool(missing.sum() >= extra.sum())
        region = missing if inside else extra
        clicks.append(pick(region if bool(region.any()) else mask, generator))
        labels.append(1.0 if inside or not bool(region.any()) else 0.0)
    click, label = torch.stack(clicks)[:, None], torch.tensor(labels, device=truth.device)[:, None]
    if prompts.points is not None and prompts.point_labels is not None:
        click, label = torch.cat([prompts.points, click], 1), torch.cat([prompts.point_labels, label], 1)
    return Prompts(points=click, point_labels=label, boxes=prompts.boxes, mask=logits)
