"""Items to batches: plain dicts, as the contract of `m3d.train` has them."""

# V = volumes, S = places where a row shows a volume, M = masks and N = boxes in reading order, (D, H, W) = model's grid

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3d.models.processing import IGNORED, IMAGE_TOKEN, M3DProcessor
from m3d.train.packing import Row, exchanges_of, pack, prefix_row, stack, unpacked, values_of
from m3d.train.views import Drawn, Talk


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else."""
    return random.Random("/".join(map(str, parts))).getrandbits(62)


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Volumes and the exchanges about them to an instruction batch.

    Attributes:
        packing: One row for the exchanges of a volume, where they can share it; else a row each.
        simulated: Masks of each volume that are also drawn from clicks and boxes.
        global_batch: Volumes an optimizer step; says which step an item belongs to (the batch's ``turn``), so that all
            ranks simulate one kind of prompt.
        multiple: Rows are padded to a multiple of this; the fast kernels of SDPA want masks whose sides 8 divides.
    """

    processor: M3DProcessor
    packing: bool = True
    simulated: int = 2
    global_batch: int = 1
    multiple: int = 8

    def __call__(self, items: Sequence[Talk]) -> dict[str, Any]:
        """The batch of some items."""
        rows, shown = self._rows(items)
        exchanges = list(exchanges_of(rows))
        owners = [volume for row, volume in zip(rows, shown, strict=True) for _ in row.exchanges]
        masks = [exchange.masks for exchange in exchanges if exchange.masks is not None]
        values = values_of(rows)
        boxes = [exchange.boxes for exchange in exchanges if exchange.boxes is not None]
        batch: dict[str, Any] = dict(stack(rows, self.processor.tokenizer.pad_token_id, self.multiple))
        batch |= {
            "pixel_values": torch.stack([item.pixels for item in items]),
            "volume_index": torch.tensor(shown),
            "masks": torch.cat(masks) if masks else _no_masks(items[0].pixels),
            "mask_volume": _mask_owners([exchange.masks for exchange in exchanges], owners),
            "names": [name for exchange in exchanges for name in exchange.names],
            "boxes": torch.cat(boxes) if boxes else torch.zeros(0, 6),
            "value_rows": torch.tensor([row for row, _, _ in values], dtype=torch.long),
            "value_places": torch.tensor([place for _, place, _ in values], dtype=torch.long),
            "values": torch.tensor([value for _, _, value in values], dtype=torch.float32),
            "pictures": [item.picture for item in items],
            "ids": [exchange.id for exchange in exchanges],
            "seed": seed_of(*(item.seed for item in items)),
            "turn": min(item.index for item in items) // self.global_batch,
        }
        if self.simulated:
            batch["prompted"], batch["prompt_seeds"] = self._prompted(items, batch["masks"], batch["mask_volume"])
        lost = sum((item.lost for item in items), Counter[str]())
        batch["counts"] = {
            "text": int((batch["labels"][:, 1:] != IGNORED).sum()),
            "masks": len(batch["masks"]),
            "boxes": int(batch["boxes"].isfinite().all(dim=1).sum()),
            "values": len(values),
            "prompted": len(batch.get("prompted", ())),
            "volumes": len(items),
            "exchanges": len(exchanges),
            "tokens": sum(map(len, rows)),
            **lost,
        }
        return batch

    def _rows(self, items: Sequence[Talk]) -> tuple[list[Row], list[int]]:
        """All rows, and for each the number of the volume that it shows."""
        rows: list[Row] = []
        shown: list[int] = []
        image_token_id = self.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        for number, item in enumerate(items):
            arrange = pack if self.packing else unpacked
            own = arrange(item.exchanges, image_token_id) or [self._silent_row()]
            rows += own
            shown += [number] * len(own)
        return rows, shown

    def _silent_row(self) -> Row:
        tokenizer = self.processor.tokenizer
        ids = list(tokenizer(self.processor.write(""))["input_ids"])
        return prefix_row(ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids)

    def _prompted(self, items: Sequence[Talk], masks: Tensor, owner: Tensor) -> tuple[Tensor, list[int]]:
        """Which masks are asked for by geometry too: some of each volume's that are not empty, and a seed for each."""
        chosen: list[int] = []
        seeds: list[int] = []
        filled = masks.flatten(1).any(dim=1)
        for number, item in enumerate(items):
            own = ((owner == number) & filled).nonzero().flatten().tolist()
            rng = random.Random(f"{item.seed}/prompts")
            for mask in sorted(rng.sample(own, k=min(self.simulated, len(own)))):
                chosen.append(mask)
                seeds.append(rng.getrandbits(62))
        return torch.tensor(chosen, dtype=torch.long), seeds


def _no_masks(pixels: Tensor) -> Tensor:
    return torch.zeros(0, *pixels.shape, dtype=torch.bool)


def _mask_owners(masks: Sequence[Tensor | None], owners: Sequence[int]) -> Tensor:
    each = [owner for some, owner in zip(masks, owners, strict=True) for _ in range(0 if some is None else len(some))]
    return torch.tensor(each, dtype=torch.long)


def collate_masks(items: Sequence[Drawn]) -> dict[str, Any]:
    """The batch of segmentation pretraining: volumes, masks of all of them, and the name of each mask."""
    owners = [number for number, item in enumerate(items) for _ in item.names]
    return {
        "pixel_values": torch.stack([item.pixels for item in items]),
        "masks": torch.cat([item.masks for item in items]),
        "mask_volume": torch.tensor(owners, dtype=torch.long),
        "names": [name for item in items for name in item.names],
        "ids": [item.id for item in items],
        "seed": seed_of(*(item.seed for item in items)),
        "counts": {"masks": len(owners), "volumes": len(items)},
    }
