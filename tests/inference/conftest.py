"""A checkpoint that was really taught a few sentences and one bright block: small, honest, made in seconds."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from data_prep.preprocess import MinMax, Preprocess
from data_prep.record import Evidence
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor, M3DSegConfig, M3DVisionConfig
from m3d.models.processing import IGNORED, add_m3d_tokens, encode_exchange
from m3d.tasks.base import Rendered
from m3d.tasks.evidence import measure_first
from m3d.train.objective import LossWeights, TalkAndDraw
from tests.fixtures.small_scan import GRID, block_scan
from tests.fixtures.small_words import words_tokenizer

LESSONS = {
    "Segment the block.": "Here is the block [SEG].",
    "Segment the ghost.": "There is no ghost in this scan.",
    "Where is the block?": "The block is at <bx_start>[0.250, 0.250, 0.250, 0.750, 0.750, 0.500]<bx_end>.",
    "Write a report of this scan.": "A bright block.",
    "Segment the banana.": "Here is the block [SEG].",
    "Segment the thing.": "Sure, it is [SEG].",
    "Draw both.": "Here is the block [SEG] and shadow [SEG].",
}
MEASURED = {  # what is measured first, and the answer
    "How far apart?": ([("distance", ("block", "shadow"), "mm")], "Here is the block [SEG]."),
    "How large is it?": ([("volume", ("block",), "mL"), ("width", ("block",), "mm")], "large"),
}


def measured_lessons(chance: random.Random) -> list[tuple[str, Rendered]]:
    """Measures are what they are, or are not seen, and the answer is the same."""
    lessons = []
    for prompt, (asked, answer) in MEASURED.items():
        evidence = [
            Evidence(measure=name, names=names, value=chance.uniform(0.2, 9) * (1 + 3 * (unit == "mm")), unit=unit)
            for name, names, unit in asked
        ]
        said = measure_first(Rendered(prompt, answer), evidence, seen=chance.random() < 0.6)
        lessons.append((prompt, said))
    return lessons


def lessons_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the lessons, so that a few steps teach them."""
    texts = [f"{prompt} {answer}" for prompt, answer in LESSONS.items()]
    texts += [f"{prompt} {said.answer}" for seed in range(9) for prompt, said in measured_lessons(random.Random(seed))]
    return words_tokenizer(texts)


def lesson_batch(processor: M3DProcessor, step: int) -> dict[str, Any]:
    lessons = [(prompt, Rendered(prompt, answer)) for prompt, answer in LESSONS.items()]
    lessons += measured_lessons(random.Random(step))
    rows = [encode_exchange(processor.tokenizer, processor.write(p), said.answer, said.given) for p, said in lessons]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens, _ in rows])
    labels = torch.tensor([learned + [IGNORED] * (length - len(learned)) for _, learned in rows])
    masks = torch.zeros(10, 1, *GRID, dtype=torch.bool)
    masks[[0, 1, 2, 3, 5, 7, 8, 9], 0, 2:6, 4:12, 6:12] = True  # blocks; shadows, the fifth and the seventh, are empty
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": labels,
        "pixel_values": processor.pixels(block_scan())[None],
        "volume_index": torch.zeros(len(rows), dtype=torch.long),
        "masks": masks,
        "mask_volume": torch.zeros(10, dtype=torch.long),
        "prompted": torch.arange(3),
        "prompt_seeds": [step, step + 1000, step + 2000],
        "turn": step,
        "ids": [prompt for prompt, _ in lessons],
        "counts": {"text": int((labels[:, 1:] != IGNORED).sum()), "masks": 10, "prompted": 3},
    }


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint that has learned the lessons."""
    torch.manual_seed(0)
    tokenizer = lessons_tokenizer()
    ids = add_m3d_tokens(tokenizer)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = M3DConfig(
        vision_config=M3DVisionConfig(
            image_size=list(GRID),
            patch_size=[4, 8, 8],
            hidden_size=16,
            intermediate_size=32,
            detail_channels=4,
            **sizes,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **sizes,
        ),
        seg_config=M3DSegConfig(
            decoder_heads=2,
            decoder_mlp_dim=32,
            iou_hidden_size=16,
            num_masks=1,
            coordinates="grid",
            upscale_norm="channel",
            mask_prompt=True,
            projector_dropout=0.0,
        ),
        pool_size=1,
        **ids,
    )
    model = M3DForConditionalGeneration(config)
    processor = M3DProcessor(tokenizer, Preprocess(grid=GRID, intensity=MinMax()), config.num_image_tokens)
    objective = TalkAndDraw(model, LossWeights(bce=5.0))
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, betas=(0.9, 0.95))
    for step in range(200):
        batch = lesson_batch(processor, step)
        losses = {
            name: loss.weight * loss.total / batch["counts"][loss.count] for name, loss in objective(batch).items()
        }
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses["text"] < 0.1, losses
    folder = tmp_path_factory.mktemp("taught") / "taught"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
