"""The whole model equals the reference to 1e-4: words, masks, losses, gradients, generation (fixture lamed_a)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DSegConfig, M3DVisionConfig
from m3d.models.perceiver import PERCEIVERS, projection
from m3d.models.published import rename_lamed
from m3d.models.seg_token import find_seg_tokens
from segvol_head import bce_loss, dice_loss

FIXTURES = Path(__file__).parents[1] / "fixtures"
CLOSE = {"atol": 1e-4, "rtol": 0}


def read(name: str) -> tuple[dict, ...]:
    folder = FIXTURES / name
    config = json.loads((folder / "config.json").read_text())
    return config, *(load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))


def vision(parts: dict, llama: dict, *, cls_token: bool) -> M3DVisionConfig:
    return M3DVisionConfig(
        image_size=llama["image_size"],
        patch_size=llama["patch_size"],
        hidden_size=parts["hidden_size"],
        intermediate_size=parts["mlp_dim"],
        num_hidden_layers=parts["num_layers"],
        num_attention_heads=parts["num_heads"],
        cls_token=cls_token,
    )


def build(config: dict) -> M3DForConditionalGeneration:
    llama, sam = config["llama"], config["sam"]
    names = [name for name in llama if name in LlamaConfig().to_dict()]
    return M3DForConditionalGeneration(
        M3DConfig(
            vision_config=vision(config["vit"], llama, cls_token=True),
            text_config=LlamaConfig(**{name: llama[name] for name in names}),
            seg_config=M3DSegConfig(
                encoder_config=vision(sam["encoder"], llama, cls_token=False),
                decoder_depth=sam["depth"],
                decoder_heads=sam["num_heads"],
                decoder_mlp_dim=sam["mlp_dim"],
                iou_hidden_size=sam["iou_head_hidden_dim"],
                merge="mean",
            ),
            image_token_id=596,
            seg_token_id=llama["seg_token_id"],
            projector_depth=llama["proj_layer_num"],
        )
    )


@pytest.fixture(scope="module")
def lamed() -> tuple[M3DForConditionalGeneration, dict, dict]:
    config, weights, inputs, outputs = read("lamed_a")
    model = build(config)
    model.load_state_dict(rename_lamed(weights))
    return model.eval(), {**inputs, "images": inputs["images"].float() / 255}, outputs


def run(model, inputs, **more):
    return model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        labels=inputs["labels"],
        pixel_values=inputs["images"],
        **more,
    )


@torch.no_grad()
def test_words_equal_reference(lamed):
    model, inputs, outputs = lamed
    out = run(model, inputs, output_hidden_states=True)
    torch.testing.assert_close(out.logits, outputs["logits"], **CLOSE)
    torch.testing.assert_close(out.loss, outputs["lm_loss"], **CLOSE)
    torch.testing.assert_close(out.hidden_states[-1][:, -34:], outputs["last_hidden"], **CLOSE)


def test_masks_losses_and_gradients_equal_reference(lamed):
    model, inputs, outputs = lamed
    model.zero_grad()
    out = run(model, inputs, draw_masks=True)
    rows = outputs["seg_ids"]
    states = run(model, inputs, output_hidden_states=True).hidden_states[-1]
    where = find_seg_tokens(inputs["input_ids"], model.config.seg_token_id)
    assert sorted(torch.bincount(where.rows, minlength=3).tolist()) == [0, 1, 2]  # the fixture has every kind of row
    prompts = model.seg_prompts(states, where)

    torch.testing.assert_close(prompts[rows], outputs["seg_prompts"], **CLOSE)  # zeros where nothing was said
    target, logits = inputs["segs"][rows].float(), out.mask_logits[rows]
    torch.testing.assert_close(logits, outputs["seg_logits_sample"], **CLOSE)

    dice, bce = dice_loss(logits, target), bce_loss(logits, target)
    torch.testing.assert_close(dice, outputs["dice_loss"], **CLOSE)
    torch.testing.assert_close(bce, outputs["bce_loss"], **CLOSE)
    total = out.loss + dice + bce
    torch.testing.assert_close(total, outputs["total_loss"], **CLOSE)

    total.backward()
    gradients = {
        "grad_proj0_weight": model.perceiver.projector[0].weight,
        "grad_q_proj0": model.language_model.model.layers[0].self_attn.q_proj.weight,
        "grad_seg_projector0_weight": model.seg_projector[0].weight,
    }
    for name, parameter in gradients.items():
        torch.testing.assert_close(parameter.grad, outputs[name], **CLOSE)
    step = len(model.language_model.lm_head.weight) // len(outputs["grad_lm_head_sample"]) + 1
    torch.testing.assert_close(
        model.language_model.lm_head.weight.grad[::step], outputs["grad_lm_head_sample"], **CLOSE
    )


@torch.no_grad()
def test_generation_equals_reference(lamed):
    model, inputs, outputs = lamed
    ids = inputs["input_ids"][:, :37]
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=inputs["images"],
        max_new_tokens=8,
        **settings,
    )
    assert said[:, 37:].tolist() == outputs["generated"].tolist()
    text = inputs["input_ids"][:, 25:37]
    said = model.generate(input_ids=text, attention_mask=torch.ones_like(text), max_new_tokens=4, **settings)
    assert said[:, 12:].tolist() == outputs["text_only_generated"].tolist()


@torch.no_grad()
def test_masks_of_generated_answers_equal_reference(lamed):
    model, inputs, outputs = lamed
    ids = torch.cat([inputs["input_ids"][:, :37], outputs["generated_seg_run"]], dim=1)
    hidden = model(input_ids=ids, pixel_values=inputs["images"], output_hidden_states=True).hidden_states[-1]
    answers = ids.clone()
    answers[:, :38] = 0  # the reference reads answers alone, and never their first token
    where = find_seg_tokens(answers, int(outputs["generate_seg_token_id"]))
    assert len(where)
    text = model.seg_prompts(hidden, where)
    spoke = where.rows.unique()
    torch.testing.assert_close(text[spoke], outputs["generate_seg_prompts"][spoke], **CLOSE)
    features = model.get_image_features(inputs["images"])
    logits = model.draw(features, text=text[spoke], volume_index=spoke)
    torch.testing.assert_close(logits, outputs["generate_seg_logits_sample"][spoke], **CLOSE)


def test_perceivers_equal_reference():
    config, weights, _, outputs = read("vision_a")
    grid = tuple(a // b for a, b in zip(config["image_size"], config["patch_size"], strict=True))
    variants = {
        "spp_mlp2_spatial": ("spatial", 2, "mlp", 2),
        "spp_mlp2_sequence": ("sequence", 2, "mlp", 2),
        "spp_linear1_spatial": ("spatial", 2, "linear", 1),
        "linear": ("spatial", 1, "linear", 1),
    }
    for name, (pooling, pool, kind, depth) in variants.items():
        projector = projection(kind, depth, config["dim"], config["llm_hidden"])
        perceiver = PERCEIVERS[pooling](grid, pool, projector)
        prefix = f"mm_projector[{name}]."
        state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        perceiver.load_state_dict({k.replace("linear.", "projector.0."): v for k, v in state.items()})
        with torch.no_grad():
            projected = perceiver(outputs["features_patch"])
        torch.testing.assert_close(projected, outputs[f"projected[{name}]"], **CLOSE)


def test_unknown_keys_are_named():
    with pytest.raises(ValueError, match=r"'resnet\.conv1\.weight' is no parameter of M3D-LaMed"):
        rename_lamed({"resnet.conv1.weight": torch.zeros(1)})
