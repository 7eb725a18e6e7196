"""`generate` as users of transformers know it: caches, padding, beams and samples, helpers that guess ahead."""

import copy

import pytest
import torch

from m3d.models import M3DForConditionalGeneration
from m3d.models.seg_token import find_seg_tokens
from m3d.models.splice import splice
from tests.conftest import small_config
from tests.fixtures.small_scan import small_scan

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TEXTS = ["What?", "What is it that you see?"]


@pytest.fixture
def model(tokenizer_and_ids) -> M3DForConditionalGeneration:
    """Larger weights, so that what is said next depends on what was seen."""
    torch.manual_seed(0)
    model = M3DForConditionalGeneration(small_config(*tokenizer_and_ids)).eval()
    with torch.no_grad():
        for part, louder in ((model.vision_tower, 5.0), (model.perceiver, 8.0), (model.language_model, 8.0)):
            for name, parameter in part.named_parameters():
                parameter.mul_(1.0 if "norm" in name else louder)
    return model


@pytest.fixture
def batch(processor):
    return processor([small_scan(0), small_scan(1)], TEXTS)


def new(sequences: torch.Tensor) -> list[list[int]]:
    return sequences[:, -GREEDY["max_new_tokens"] :].tolist()


def test_what_is_said_depends_on_what_is_seen(model, processor):
    """Else the other tests would show little."""
    said = [new(model.generate(**processor(small_scan(seed), "What?"), **GREEDY)) for seed in range(4)]
    assert len({str(one) for one in said}) == 4


@pytest.mark.parametrize("how", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 8}])
def test_every_cache_says_what_none_says(model, batch, how):
    assert model.generate(**batch, **GREEDY, **how).tolist() == model.generate(**batch, **GREEDY).tolist()


def test_left_padding_is_no_padding(model, processor, batch):
    assert (batch["attention_mask"][0] == 0).any() and batch["attention_mask"][:, -1].all()
    alone = [new(model.generate(**processor(small_scan(row), text), **GREEDY))[0] for row, text in enumerate(TEXTS)]
    assert new(model.generate(**batch, **GREEDY)) == alone


def test_embeddings_go_on_as_their_ids(model, batch):
    seen = model.get_image_features(batch["pixel_values"]).pooler_output
    embeds = splice(
        model.get_input_embeddings()(batch["input_ids"]), batch["input_ids"], seen, model.config.image_token_id
    )
    said = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **GREEDY)
    assert said.tolist() == new(model.generate(**batch, **GREEDY))


def test_words_alone_need_no_volume(model, processor):
    assert model.generate(**processor(text=TEXTS), **GREEDY).shape[0] == 2


def beams(model, given):
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    out = model.generate(**given, **settings, return_dict_in_generate=True)
    return out.sequences.tolist(), out.sequences_scores


def test_beams_look_at_the_volume_of_their_row(model, processor, batch):
    together, scores = beams(model, batch)
    assert len(together) == 4
    for row, text in enumerate(TEXTS):
        alone, own = beams(model, processor(small_scan(row), text))
        assert new(torch.tensor(alone)) == new(torch.tensor(together[2 * row : 2 * row + 2]))
        torch.testing.assert_close(own, scores[2 * row : 2 * row + 2], atol=1e-4, rtol=1e-4)


def test_beams_of_rows_that_share_or_swap_volumes(model, processor, batch):
    """``volume_index`` is none of the base class's: it would repeat volumes and index both, and mix them up."""
    for index in ([1, 0], [0, 0], [1, 1]):
        given = dict(batch) | {"volume_index": torch.tensor(index)}
        plain = dict(batch) | {"pixel_values": batch["pixel_values"][index]}
        (said, scores), (wanted, expected) = beams(model, given), beams(model, plain)
        assert said == wanted
        torch.testing.assert_close(scores, expected)
    seen = []
    model.vision_tower.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    beams(model, dict(batch) | {"volume_index": torch.tensor([0, 0]), "pixel_values": batch["pixel_values"][:1]})
    assert seen == [1]


def test_beams_of_several_volumes_in_a_row(model, processor):
    scans = [small_scan(seed) for seed in range(3)]
    both = processor([scans[:2], scans[2:]], ["<im_patch> and <im_patch>?", "Only <im_patch>?"])
    assert len(both["pixel_values"]) == 3
    together, scores = beams(model, both)
    alone, own = beams(model, processor([scans[:2]], ["<im_patch> and <im_patch>?"]))
    assert new(torch.tensor(together[:2])) == new(torch.tensor(alone))
    torch.testing.assert_close(scores[:2], own, atol=1e-4, rtol=1e-4)


def test_samples_are_drawn_for_each_row(model, batch):
    torch.manual_seed(0)
    settings = GREEDY | {"do_sample": True, "num_return_sequences": 3}
    said = model.generate(**batch, **settings)
    assert said.shape == (6, batch["input_ids"].shape[1] + 6)
    assert said[:3, :-6].tolist() == [batch["input_ids"][0].tolist()] * 3
    assert len({tuple(row) for row in new(said)[:3]}) > 1


def test_prompts_that_do_not_fit_are_told_with_beams_too(model, batch):
    given = dict(batch) | {"pixel_values": batch["pixel_values"][:1]}
    with pytest.raises(ValueError, match=r"volumes need .* <im_patch> tokens in all, the prompts have"):
        beams(model, given)


@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_guessing_ahead_changes_nothing(model, processor, how):
    one = processor(small_scan(0), TEXTS[1])
    helper = {"assistant_model": copy.deepcopy(model)} if how == "assistant" else {"prompt_lookup_num_tokens": 2}
    assert model.generate(**one, **GREEDY, **helper).tolist() == model.generate(**one, **GREEDY).tolist()


@torch.no_grad()
def test_the_states_of_generation_prompt_masks_as_reading_does(model, processor):
    """The state that predicts ``[SEG]``, of the step that said it, is that of a pass over the whole answer."""
    one = processor(small_scan(0), "Draw. Liver")
    seg = model.config.seg_token_id
    out = model.generate(
        **one, **GREEDY | {"max_new_tokens": 2}, bad_words_ids=None, forced_eos_token_id=seg,
        return_dict_in_generate=True, output_hidden_states=True,
    )  # fmt: skip
    assert out.sequences[0, -1] == seg
    states = torch.cat([step[-1] for step in out.hidden_states], dim=1)
    where = find_seg_tokens(out.sequences, seg)
    whole = model(input_ids=out.sequences, pixel_values=one["pixel_values"], draw_masks=True, output_hidden_states=True)
    expected = model.seg_prompts(whole.hidden_states[-1], where)
    torch.testing.assert_close(model.seg_prompts(states, where), expected, atol=1e-5, rtol=1e-4)


def test_the_checkpoint_says_how_to_stop(model, tmp_path):
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    assert M3DForConditionalGeneration.from_pretrained(tmp_path).generation_config.max_new_tokens == 3
