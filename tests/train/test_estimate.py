"""Estimates against reality: parameters and optimizer bytes exactly, activations against what autograd keeps."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DSegConfig, M3DVisionConfig
from m3d.models.lora import Lora
from m3d.recipes.parts import Parts, apply
from m3d.train import activations
from m3d.train.activations import Sizes, Work
from m3d.train.estimate import (
    BUCKET,
    GIB,
    LIVE,
    MACHINES,
    Count,
    Row,
    Setup,
    count_parameters,
    judge,
    largest_block,
    learning,
    lighter,
    memory,
    pairs,
    states,
    talk_and_draw,
)
from m3d.train.objective import balanced_bce
from segvol_head import ImageFeatures, Prompts, dice_loss

INSTRUCT = Parts(
    vision_tower="full", perceiver="full", language_model="lora", seg_projector="full", seg_head="full", lora=Lora()
)
IDS = {"image_token_id": 190, "box_start_token_id": 191, "box_end_token_id": 192, "seg_token_id": 193}


def published() -> M3DConfig:
    """M3D-LaMed with LLaMA-2-7B, as released (REFERENCE A1, A2)."""
    return M3DConfig(
        vision_config=M3DVisionConfig(),
        text_config=LlamaConfig(vocab_size=32004),
        seg_config=M3DSegConfig(encoder_config=M3DVisionConfig(cls_token=False)),
    )


def tiny(*, detail: tuple[int, int] = (0, 8), pooling: str = "spatial", **seg: object) -> M3DConfig:
    vision = {
        "image_size": [32, 64, 64], "patch_size": [4, 8, 8], "hidden_size": 96, "intermediate_size": 384,
        "num_hidden_layers": 3, "num_attention_heads": 4, "detail_channels": detail[0], "detail_filters": detail[1],
    }  # fmt: skip
    head = {
        "decoder_heads": 4,
        "decoder_mlp_dim": 192,
        "iou_hidden_size": 64,
        "num_masks": 1,
        "upscale_norm": "channel",
    }
    text = LlamaConfig(
        vocab_size=200, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
    )
    return M3DConfig(
        vision_config=M3DVisionConfig(**vision),
        text_config=text,
        seg_config=M3DSegConfig(**head, **seg),
        pooling=pooling,
        **IDS,
    )


def on_meta(config: M3DConfig, parts: Parts) -> M3DForConditionalGeneration:
    with torch.device("meta"):
        model = M3DForConditionalGeneration(config)
        apply(model, parts)
    return model


def kept_by(module: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that autograd keeps of a call, each storage once, parameters apart."""
    own = {value.untyped_storage().data_ptr() for value in module.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(call())
    return sum(found.values())


# -- parameters --------------------------------------------------------------------------------------------------------


def test_the_published_model_has_the_published_number_of_values():
    model = on_meta(published(), INSTRUCT)
    counts = count_parameters(model)
    added = counts["lora"].total + counts["new_tokens"].total
    buffer = 3 * 768 // 2  # the matrix of random frequencies, a buffer in both
    dead = 13_388  # the reference's 2-D convolutions, which can never run (REFERENCE A1.4)
    assert sum(count.total for count in counts.values()) - added + buffer + dead == 6_983_027_792


def test_the_published_trainable_number_is_ours_but_for_what_is_named():
    counts = count_parameters(on_meta(published(), INSTRUCT))
    assert counts["lora"].trainable == 39_976_960  # 39.98 M: rank 16 on 7 linear layers of 32
    assert counts["vision_tower"].trainable == 87_389_184
    assert counts["perceiver"].trainable == 19_931_136
    assert counts["seg_projector"].trainable == 19_927_808
    assert counts["language_model"].trainable == 0
    released = 39_976_960 + 87_389_184 + 19_931_136 + 19_927_808 + 117_331_280 + 2 * 131_088_384
    assert round(released / 1e6, 1) == 546.7
    whole_tables = 2 * 131_088_384  # the release trains both tables; we, as the paper says, the rows of new tokens
    our_rows = 2 * 4 * 4096
    quality = (768 * 256 + 256) + (256 * 256 + 256) + (256 * 4 + 4)  # the head that no loss reaches
    unused_masks = 3 * (2 * (768 * 768 + 768) + 768 * 96 + 96)  # three of four masks are never drawn
    buffer, dead = 1_152, 13_388
    ours = sum(count.trainable for count in counts.values())
    assert ours == released - whole_tables + our_rows - quality - unused_masks - buffer - dead


def test_parameters_of_a_real_model_and_its_meta_twin_agree():
    real = M3DForConditionalGeneration(tiny(encoder_config=None))
    apply(real, INSTRUCT)
    twin = on_meta(tiny(encoder_config=None), INSTRUCT)
    assert count_parameters(real) == count_parameters(twin)
    assert sum(count.total for count in count_parameters(real).values()) == sum(p.numel() for p in real.parameters())
    whole = dict.fromkeys(("vision_tower", "perceiver", "seg_head", "seg_projector"), "full")
    assert learning(real) == whole | {"language_model": "lora"}
    assert learning(on_meta(tiny(), Parts()))["language_model"] == "frozen"


# -- weights, gradients, optimizer -------------------------------------------------------------------------------------


def test_optimizer_bytes_are_those_of_adamw():
    model = M3DForConditionalGeneration(tiny(encoder_config=None))
    apply(model, INSTRUCT)
    learns = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learns)
    for value in learns:
        value.grad = torch.zeros_like(value)
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    got = states(count_parameters(model), Setup(engine="single", gpus=1, batch=1, micro_batch=1, bf16=False))
    assert got["optimizer"] == held
    assert got["gradients"] == sum(value.grad.nbytes for value in learns)
    assert got["weights"] == sum(value.nbytes for value in model.parameters())
    assert got["buffers"] == 0


@pytest.mark.parametrize(
    ("engine", "gpus", "weights", "gradients", "optimizer"),
    [  # ZeRO, figure 1: 7.5 billion parameters on 64 GPUs, K = 12; in GB
        ("zero2", 1, 15.0, 15.0, 90.0),
        ("zero2", 64, 15.0, 0.234, 1.406),
        ("zero3", 64, 0.234, 0.234, 1.406),
    ],
)
def test_zero_has_the_bytes_of_its_paper(engine, gpus, weights, gradients, optimizer):
    psi = 7_500_000_000
    counts = {"all": Count(total=psi, trainable=psi, tensors=1, stored=4 * psi, stored_trainable=4 * psi, wide=psi)}
    got = states(counts, Setup(engine=engine, gpus=gpus, batch=64, micro_batch=1))
    gathered = LIVE if engine == "zero3" else 0
    assert (got["weights"] - gathered) / 1e9 == pytest.approx(weights, abs=1e-3)
    assert got["gradients"] / 1e9 == pytest.approx(gradients, abs=1e-3)
    assert got["optimizer"] / 1e9 == pytest.approx(optimizer, abs=1e-3)
    assert got["buffers"] == BUCKET


def test_frozen_values_cost_their_weight_alone_and_offload_moves_adam_to_the_host():
    counts = {
        "frozen": Count(total=1000, stored=2000),
        "learned": Count(total=100, trainable=100, tensors=1, stored=400, stored_trainable=400, wide=100),
    }
    setup = Setup(engine="zero2", gpus=1, batch=1, micro_batch=1)
    assert states(counts, setup) == {
        "weights": 2200, "gradients": 200, "optimizer": 1200, "buffers": 400, "host": 0
    }  # fmt: skip
    moved = states(counts, Setup(engine="zero2", gpus=1, batch=1, micro_batch=1, offload=True))
    assert (moved["optimizer"], moved["host"]) == (0, 1200)
    plain = states(counts, Setup(engine="single", gpus=1, batch=1, micro_batch=1))
    assert plain == {"weights": 2400, "gradients": 400, "optimizer": 804, "buffers": 200}
    assert states(counts, Setup(engine="ddp", gpus=2, batch=2, micro_batch=1))["buffers"] == 200 + 400
    shared = states(counts, Setup(engine="fsdp", gpus=4, batch=4, micro_batch=1), block=10)
    assert shared == {"weights": 600 + 40, "gradients": 100, "optimizer": 201, "buffers": 0}


# -- activations -------------------------------------------------------------------------------------------------------


def test_a_gpt_layer_without_dropout_keeps_32_bytes_a_value():
    """Korthikanti et al. 2022: 34 s b h in all, of which the two dropout masks after the MLP and attention are 2."""
    work = Work(rows=1, tokens=1, volumes=1)
    assert activations.vit_layer(Sizes(width=4096, mlp=4 * 4096, layers=1, heads=0), work) == 32 * 4096


def test_checkpointing_keeps_what_enters_each_layer_and_one_layer():
    assert activations.stacked(10, 32, 2, 5, checkpointing=False) == 1600
    assert activations.stacked(10, 32, 2, 5, checkpointing=True) == 5 * (20 + 32)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_towers_keep_what_the_formula_says(bf16):
    config = tiny(encoder_config=None)
    tower = M3DForConditionalGeneration(config).vision_tower
    work = Work(rows=0, tokens=0, volumes=2, bf16=bf16, wide=bf16)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        kept = kept_by(tower, lambda: tower(torch.rand(2, 1, 32, 64, 64)))
    casts = 2 * sum(value.numel() for value in tower.parameters()) if bf16 else 0
    assert kept - casts == pytest.approx(activations.vision(config.vision, work), rel=0.1)


@pytest.mark.parametrize(("how", "bf16"), list(itertools.product(["full", "frozen", "lora"], [False, True])))
def test_the_language_model_keeps_what_the_formula_says(how, bf16):
    config = tiny()
    model = M3DForConditionalGeneration(config)
    apply(model, Parts(language_model=how, lora=Lora(rank=2, dropout=0.0)))
    if bf16:
        model.bfloat16()
    layers = model.language_model.model
    entering = torch.randn(3, 100, 128, dtype=torch.bfloat16 if bf16 else None, requires_grad=True)
    kept = kept_by(layers, lambda: layers(inputs_embeds=entering))
    work = Work(rows=3, tokens=100, volumes=1, bf16=bf16, lora_dropout=False)
    assert kept == pytest.approx(activations.language(config.text, how, work), rel=0.06)


def test_dropout_of_lora_keeps_an_input_and_a_mask_for_each_layer():
    config = tiny()
    model = M3DForConditionalGeneration(config)
    apply(model, Parts(language_model="lora", lora=Lora(rank=2, dropout=0.1)))
    layers = model.language_model.model.train()
    kept = kept_by(layers, lambda: layers(inputs_embeds=torch.randn(3, 100, 128, requires_grad=True)))
    work = Work(rows=3, tokens=100, volumes=1, bf16=False)
    cpu = 3 * 100 * 4 * (6 * 128 + 344) * 3  # this CPU's masks are floats of four bytes; CUDA's are of one
    assert kept == pytest.approx(activations.language(config.text, "lora", work) + cpu, rel=0.06)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_mask_head_keeps_what_the_formula_says(bf16):
    config = tiny(encoder_config=None)
    head = M3DForConditionalGeneration(config).seg_head
    seen = ImageFeatures(tokens=torch.randn(2, 96, 8, 8, 8, requires_grad=True))
    truth, owner = torch.rand(3, 1, 32, 64, 64) > 0.9, torch.tensor([0, 0, 1])

    def draw() -> torch.Tensor:
        logits = head.decode(seen, Prompts(text=torch.randn(3, 96, requires_grad=True)), owner)
        return dice_loss(logits, truth) + balanced_bce(logits, truth, 0.1).mean()

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        kept = kept_by(head, draw)
    work = Work(rows=2, tokens=1, volumes=2, masks=3, bf16=bf16, wide=bf16)
    assert kept == pytest.approx(activations.mask_head(config, work), rel=0.06)


@pytest.mark.parametrize(("channels", "filters", "bf16"), [(8, 8, False), (16, 8, False), (4, 16, False), (8, 8, True)])
def test_the_detail_path_keeps_what_the_formula_says(channels, filters, bf16):
    config = tiny(encoder_config=None, detail=(channels, filters))
    tower = M3DForConditionalGeneration(config).vision_tower
    work = Work(rows=0, tokens=0, volumes=1, bf16=bf16, wide=bf16)
    pixels = torch.rand(1, 1, 32, 64, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        closely = kept_by(tower, lambda: tower.detail_embedding(tower.detail(pixels)))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        whole = kept_by(tower, lambda: tower.look(pixels))
    casts = 2 * sum(value.numel() for value in tower.parameters()) if bf16 else 0
    own = [*tower.detail.parameters(), *tower.detail_embedding.parameters()]
    casts_of_its_own = 2 * sum(value.numel() for value in own) if bf16 else 0
    assert closely - casts_of_its_own == pytest.approx(activations.detail(config.vision, work), rel=0.05)
    assert whole - casts == pytest.approx(activations.vision(config.vision, work), rel=0.05)


def test_detail_is_counted_with_the_tower_that_learns_and_not_with_the_masks():
    plain, detailed = tiny(encoder_config=None), tiny(encoder_config=None, detail=(8, 16))
    work = Work(rows=0, tokens=0, volumes=2, masks=3, bf16=True)
    voxels, more = 2 * 32 * 64 * 64, 16 * 16 + 3 * 8
    assert activations.vision(detailed.vision, work) - activations.vision(plain.vision, work) == 2 * voxels * more
    assert activations.mask_head(detailed, work) == activations.mask_head(plain, work)


@pytest.mark.parametrize("pooling", ["spatial", "stacked"])
def test_the_perceiver_keeps_what_the_formula_says(pooling):
    config = tiny(encoder_config=None, pooling=pooling)
    perceiver = M3DForConditionalGeneration(config).perceiver
    kept = kept_by(perceiver, lambda: perceiver(torch.randn(2, 512, 96, requires_grad=True)))
    entering = 96 * (8 if pooling == "stacked" else 1)
    assert kept == 2 * 64 * 4 * (entering + 2 * 128)  # 64 tokens of a volume; into two linear layers and a GELU
    assert activations.perceiver(config, Work(rows=1, tokens=1, volumes=2, bf16=False)) == kept


# -- machines ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> tuple[M3DConfig, dict[str, Count], dict]:
    model = on_meta(published(), INSTRUCT)
    return model.config, count_parameters(model), learning(model)


def test_logits_are_counted_where_something_is_learned(llama):
    config, counts, how = llama
    setup = Setup(engine="zero2", gpus=8, batch=64, micro_batch=8)
    needed = memory(counts, talk_and_draw(config, how, counts, Row(tokens=512)), setup)
    assert needed.logits == 8 * (512 - 256) * 32_004 * 14
    assert needed.total == sum(
        (needed.weights, needed.gradients, needed.optimizer, needed.activations, needed.logits, needed.buffers, 2 * GIB)
    )


def test_the_published_instruct_stage_fits_eight_a100_and_not_one_small_gpu(llama):
    config, counts, how = llama
    kept = talk_and_draw(config, how, counts, Row(tokens=512, masks=0.25))
    setup = Setup(engine="zero2", gpus=8, batch=64, micro_batch=8)
    fits = {name: judge(counts, kept, setup, name) for name in MACHINES}
    assert fits["8xA100-80GB"].fits and fits["8xH200"].fits
    small = fits["1x24GB"]
    assert not small.fits and small.setup.gpus == 1 and small.setup.accumulation == 8
    assert small.remedy is not None and small.remedy.checkpointing
    assert "checkpointing=true" in small.advice
    assert memory(counts, kept, small.remedy).total <= MACHINES["1x24GB"].gib * GIB < small.memory.total


def test_full_training_of_7b_needs_more_than_one_gpu(llama):
    everything = Parts(vision_tower="full", language_model="full", seg_projector="full", seg_head="full")
    model = on_meta(published(), everything)
    counts, config = count_parameters(model), model.config
    kept = talk_and_draw(config, learning(model), counts, Row(tokens=512))
    setup = Setup(engine="ddp", gpus=8, batch=64, micro_batch=1, checkpointing=True)
    alone = judge(counts, kept, setup, "1x24GB")
    assert alone.remedy is None and "smaller language model" in alone.advice
    shared = judge(counts, kept, setup, "8xA100-80GB")
    assert not shared.fits and shared.remedy is not None and shared.remedy.engine in ("zero2", "zero3")
    assert f"--engine {shared.remedy.engine}" in shared.advice
    assert largest_block(config, counts) > 32_004 * 4096


def test_lighter_setups_begin_with_the_cheapest_change():
    tried = list(lighter(Setup(engine="ddp", gpus=8, batch=64, micro_batch=4)))
    assert [(s.engine, s.micro_batch, s.checkpointing, s.offload) for s in tried[:5]] == [
        ("ddp", 4, False, False), ("ddp", 2, False, False), ("ddp", 4, True, False), ("ddp", 2, True, False),
        ("ddp", 1, True, False),
    ]  # fmt: skip
    assert tried[-1] == Setup(engine="zero3", gpus=8, batch=64, micro_batch=1, checkpointing=True, offload=True)
    alone = list(lighter(Setup(engine="single", gpus=1, batch=1, micro_batch=1)))
    assert {s.engine for s in alone} == {"single", "zero3"}


def test_pairs_grow_with_the_micro_batch():
    kept = pairs(M3DVisionConfig(), Sizes(width=768, mlp=3072, layers=12, heads=12), 128)
    one, two = (kept(Setup(engine="ddp", gpus=8, batch=64, micro_batch=n))[0] for n in (1, 2))
    assert two == 2 * one
    tokens = 2049 + 128  # both towers are 12 layers x 768 with autocast: residuals in 4 bytes, the rest in 2
    assert one == tokens * 12 * (36 * 768 + 4 * 12)
