"""Packed rows say, to every loss and every gradient, what the same exchanges say each in a row of its own."""

import copy
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, Qwen2Config

from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DSegConfig, M3DVisionConfig
from m3d.models.packed_mask import for_attention
from m3d.models.processing import IGNORED, encode_exchange
from m3d.train.collate import Collator
from m3d.train.exchanges import Exchange
from m3d.train.objective import LossWeights, TalkAndDraw
from m3d.train.packing import PADDING, block_mask, pack, prefix_length, stack, unpacked, values_of
from m3d.train.views import Talk

GRID = (8, 16, 24)
SAID = [
    [("Draw the liver.", "It is the liver [SEG]."), ("Is it a CT?", "Yes."), ("Both?", "liver [SEG] and spleen [SEG]")],
    [("What do you see in this scan, in a few words?", "An abdomen."), ("Where?", "Here is the spleen [SEG].")],
]
IMAGE = 9


def exchange(name: str, ids: list[int], learned: int) -> Exchange:
    return Exchange(name, ids, [IGNORED] * (len(ids) - learned) + ids[len(ids) - learned :])


def text_config(kind: str, vocabulary: int):
    sizes = {
        "vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return {
        "llama": lambda: LlamaConfig(**sizes),
        "qwen2": lambda: Qwen2Config(**sizes, num_key_value_heads=1),
        "phi3": lambda: Phi3Config(**sizes, num_key_value_heads=2),
    }[kind]()


def build(kind: str, attention: str, tokenizer_and_ids) -> M3DForConditionalGeneration:
    tokenizer, ids = tokenizer_and_ids
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = M3DConfig(
        vision_config=M3DVisionConfig(image_size=list(GRID), patch_size=[4, 8, 8], detail_channels=4, **sizes),
        text_config=text_config(kind, len(tokenizer)),
        seg_config=M3DSegConfig(
            decoder_heads=2, decoder_mlp_dim=32, iou_hidden_size=16, num_masks=1, coordinates="grid", mask_prompt=True,
            upscale_norm="channel", projector_dropout=0.0,
        ),
        pool_size=1,
        **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    model = M3DForConditionalGeneration(config)
    model.language_model.set_attn_implementation(attention)
    return model


def items(processor) -> list[Talk]:
    """Two volumes with three and two exchanges of different lengths, four masks in all, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    talks = []
    for number, said in enumerate(SAID):
        exchanges = []
        for turn, (prompt, answer) in enumerate(said):
            ids, labels = encode_exchange(processor.tokenizer, processor.write(prompt), answer)
            masks = torch.rand(answer.count("[SEG]"), 1, *GRID, generator=generator) > 0.7
            if turn == 0:
                masks[:] = False
            exchanges.append(Exchange(f"{number}/{turn}", ids, labels, masks if len(masks) else None))
        pixels = torch.rand(1, *GRID, generator=generator)
        talks.append(Talk(str(number), number, f"0/{number}", pixels, tuple(exchanges), Counter()))
    return talks


def learn(model: M3DForConditionalGeneration, batch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    objective = TalkAndDraw(model, LossWeights())
    losses = objective(batch)
    values = {name: loss.total / batch["counts"][loss.count] for name, loss in losses.items()}
    model.zero_grad()
    torch.stack([values[name] * losses[name].weight for name in values]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in values.items()}, gradients


CASES = [
    ("llama", "sdpa", False), ("llama", "eager", True), ("qwen2", "sdpa", True), ("qwen2", "eager", False),
    ("phi3", "sdpa", False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "attention", "checkpointing"), CASES)
def test_losses_and_all_gradients_equal_those_of_unpacked_rows(
    kind, attention, checkpointing, tokenizer_and_ids, processor
):
    apart = build(kind, attention, tokenizer_and_ids).train()
    together = copy.deepcopy(apart)
    if checkpointing:
        together.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    talks = items(processor)
    plain = Collator(processor=processor, packing=False)(talks)
    packed = Collator(processor=processor)(talks)
    assert plain["attention_mask"].ndim == 2 and packed["attention_mask"].ndim == 4
    assert len(plain["input_ids"]) == 5 and len(packed["input_ids"]) == 2
    same = {key: value for key, value in plain["counts"].items() if key != "tokens"}
    assert {key: packed["counts"][key] for key in same} == same
    assert packed["counts"]["tokens"] == plain["counts"]["tokens"] - 3 * (1 + processor.num_image_tokens)
    expected, wanted = learn(apart, plain)
    losses, gradients = learn(together, packed)
    assert set(losses) == {"text", "dice", "bce", "prompted"}
    assert losses == pytest.approx(expected, rel=1e-5)
    assert set(gradients) == set(wanted) and len(wanted) > 50
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():  # some are zero in theory (biases of keys): noise is measured by the largest
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-4 * largest)
        assert error < 1e-5, (name, float(error), float(gradient.norm()), float(largest))


def test_a_pack_shares_the_prefix_and_goes_on_from_it_in_each_exchange():
    one = exchange("a", [1, IMAGE, IMAGE, 5, 6, 2], learned=2)
    two = exchange("b", [1, IMAGE, IMAGE, 7, 8, 4, 2], learned=2)
    (row,) = pack([one, two], IMAGE)
    assert row.ids == [1, IMAGE, IMAGE, 5, 6, 2, 7, 8, 4, 2]
    assert row.labels == [-100, -100, -100, -100, 6, 2, -100, -100, 4, 2]
    assert row.positions == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert row.segments == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert row.exchanges == (one, two)
    assert [row.ids for row in unpacked([one, two], IMAGE)] == [one.ids, two.ids]


def test_what_cannot_share_a_row_has_its_own():
    plain = exchange("plain", [1, IMAGE, 5, 6, 2], learned=2)
    caption = exchange("caption", [1, IMAGE, 6, 6, 2], learned=3)  # its first word is predicted by the volume
    behind = exchange("behind", [1, 7, IMAGE, 5, 6, 2], learned=2)  # words before the volume
    other = exchange("other", [1, IMAGE, 8, 6, 2], learned=1)
    rows = pack([plain, caption, behind, other], IMAGE)
    assert [[one.id for one in row.exchanges] for row in rows] == [["plain", "other"], ["caption"], ["behind"]]
    assert rows[2].positions == [0, 1, 2, 3, 4, 5]
    assert prefix_length([1, 7, IMAGE, 5], IMAGE) == 3
    assert prefix_length([1, 7], IMAGE) == 0


def test_the_mask_lets_each_see_the_prefix_and_itself():
    seen = block_mask(torch.tensor([[0, 0, 1, 1, 2, PADDING]]))[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],  # padding sees itself: no softmax over nothing
    ]


def test_rows_are_padded_to_the_longest_and_to_a_multiple():
    rows = unpacked([exchange("a", [1, IMAGE, 5, 2], 1), exchange("b", [1, IMAGE, *range(20, 27), 2], 1)], IMAGE)
    batch = stack(rows, pad_token_id=0, multiple=8)
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 10]
    assert stack(rows, pad_token_id=0, multiple=1)["input_ids"].shape == (2, 10)
    assert batch["labels"][0].tolist() == [-100, -100, -100, 2] + [-100] * 12


def test_exchanges_are_tokenised_in_a_pack_as_they_are_alone(processor):
    (talk, _) = items(processor)
    batch = Collator(processor=processor)([talk])
    start = 1 + processor.num_image_tokens
    found, at = [], start
    for one in talk.exchanges:
        found.append(batch["input_ids"][0, at : at + len(one.ids) - start].tolist())
        at += len(one.ids) - start
    assert found == [one.ids[start:] for one in talk.exchanges]
    assert all(one.ids[-1] == processor.tokenizer.eos_token_id == one.labels[-1] for one in talk.exchanges)


def test_each_kind_of_attention_gets_the_mask_it_takes():
    config = LlamaConfig()
    mask = torch.tensor([[[[True, False], [True, True]]]])
    config._attn_implementation = "sdpa"
    assert for_attention(mask, config, torch.float32) is mask
    config._attn_implementation = "eager"
    added = for_attention(mask, config, torch.float32)
    assert added[0, 0, 0].tolist() == [0, torch.finfo(torch.float32).min]
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="turn packing off"):
        for_attention(mask, config, torch.float32)
    plain = torch.ones(1, 2)
    assert for_attention(plain, config, torch.float32) is plain


def test_measured_answers_are_read_before_their_first_learned_token():
    exchanges = [
        Exchange("a", [1, 9, 9, 5, 6, 7], [-100] * 4 + [6, 7], value=3.0),
        Exchange("b", [1, 9, 9, 5, 2], [-100] * 4 + [2]),
        Exchange("c", [1, 9, 9, 5, 5, 8, 2], [-100] * 5 + [8, 2], value=4.0),
    ]
    for arrange, expected in ((pack, [(0, 3, 3.0), (0, 9, 4.0)]), (unpacked, [(0, 3, 3.0), (2, 4, 4.0)])):
        rows = arrange(exchanges, 9)
        assert values_of(rows) == expected
        for row, place, _ in values_of(rows):
            assert rows[row].labels[place] == -100 != rows[row].labels[place + 1]
