"""The whole model, small, in the toy run's place: LoRA, learned token rows, masks by name and by clicks."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from m3d.models import M3DForConditionalGeneration, M3DProcessor
from m3d.models.lora import Lora
from m3d.models.processing import add_m3d_tokens
from m3d.recipes.parts import Parts, apply
from m3d.train.objective import LossWeights, TalkAndDraw
from tests.conftest import GRID, Preprocess, small_config

PARTS = Parts(
    vision_tower="full",
    perceiver="full",
    language_model="lora",
    seg_projector="full",
    seg_head="full",
    lora=Lora(rank=2, alpha=4, dropout=0.0),
)


class Volumes(torch.utils.data.Dataset):
    """One exchange about each volume; two of three draw a cuboid, and texts differ in length."""

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> dict:
        drawn = torch.Generator().manual_seed(index)
        mask = torch.zeros(1, *GRID, dtype=torch.bool)
        mask[0, 1 + index % 3 : 5, 2:10, 4 : 12 + index % 4] = True
        answer = " [SEG]" if index % 3 else " nothing" * (1 + index % 2)
        return {"index": index, "pixels": torch.rand(1, *GRID, generator=drawn), "mask": mask, "answer": answer}


class Collate:
    def __init__(self, processor: M3DProcessor) -> None:
        self.processor = processor

    def __call__(self, items: list[dict]) -> dict:
        said = [self.processor.write(f"Draw it.{item['answer']}") for item in items]
        encoded = self.processor.tokenizer(said, return_tensors="pt", padding=True, padding_side="right")
        labels: Tensor = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        labels[:, : self.processor.num_image_tokens + 1] = -100
        drawn = [number for number, item in enumerate(items) if "[SEG]" in item["answer"]]
        masks = [items[number]["mask"] for number in drawn]
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": labels,
            "pixel_values": torch.stack([item["pixels"] for item in items]),
            "volume_index": torch.arange(len(items)),
            "masks": torch.stack(masks) if masks else torch.zeros(0, 1, *GRID, dtype=torch.bool),
            "mask_volume": torch.tensor(drawn, dtype=torch.long),
            "prompted": torch.arange(len(drawn)),
            "prompt_seeds": [items[number]["index"] for number in drawn],
            "turn": 4,
            "ids": [f"case/{item['index']:02d}" for item in items],
            "counts": {
                "text": int((labels[:, 1:] != -100).sum()),
                "masks": len(drawn),
                "prompted": len(drawn),
                "tokens": int(encoded["attention_mask"].sum()),
                "volumes": len(items),
            },
        }


def letters() -> PreTrainedTokenizerFast:
    """Bytes in a fixed order: that of ``ByteLevel.alphabet()`` is another in every process."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def small_talk(projector_dropout: float = 0.0) -> tuple[TalkAndDraw, Volumes, Collate]:
    tokenizer = letters()
    ids = add_m3d_tokens(tokenizer)
    torch.manual_seed(0)
    model = M3DForConditionalGeneration(small_config(tokenizer, ids, projector_dropout=projector_dropout))
    apply(model, PARTS)
    processor = M3DProcessor(tokenizer, Preprocess(grid=GRID), model.config.num_image_tokens)
    return TalkAndDraw(model, LossWeights()), Volumes(), Collate(processor)
