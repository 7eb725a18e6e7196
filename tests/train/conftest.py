"""A batch of two exchanges about one volume, and the small model that answers it."""

from typing import Any

import pytest
import torch

from m3d.models import M3DForConditionalGeneration


@pytest.fixture
def tiny_model(model) -> M3DForConditionalGeneration:
    return model


@pytest.fixture
def tiny_batch(processor) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    texts = [processor.write(text) for text in ("Draw it. Liver [SEG]", "Where? Spleen [SEG] and liver [SEG].")]
    encoded = processor.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    labels[:, : processor.num_image_tokens + 1] = -100
    pixels = torch.rand(1, 1, 8, 16, 24, generator=generator)
    masks = torch.zeros(3, 1, 8, 16, 24, dtype=torch.bool)
    masks[0, 0, 2:6, 4:12, 4:12] = True
    masks[1, 0, 1:4, 2:6, 12:20] = True
    masks[2, 0, 2:6, 4:12, 4:12] = True
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": labels,
        "pixel_values": pixels,
        "volume_index": torch.zeros(2, dtype=torch.long),
        "masks": masks,
        "mask_volume": torch.zeros(3, dtype=torch.long),
        "prompted": torch.tensor([0, 1]),
        "prompt_seeds": [1, 2],
        "turn": 0,
        "seed": 0,
        "ids": ["case/00", "case/01"],
        "counts": {
            "text": int((labels[:, 1:] != -100).sum()), "masks": 3, "prompted": 2, "volumes": 1, "exchanges": 2,
            "tokens": int(encoded["attention_mask"].sum()),
        },
    }  # fmt: skip
