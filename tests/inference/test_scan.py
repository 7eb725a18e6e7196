"""Look once, ask often: words, boxes and masks on the scan's own grid, from a model that was really taught."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

import m3d
from data_prep.boxes import Box
from data_prep.volume import BadScan, Volume
from data_prep.write import write_volume
from m3d.inference import talking
from m3d.inference.checkpoints import resolve
from m3d.inference.drawing import draw
from m3d.inference.measuring import plain_words
from m3d.inference.postprocess import PostProcess
from m3d.inference.results import FoundMeasure
from m3d.inference.talking import _written
from m3d.models.box_head import number_reader
from m3d.models.processing import encode_exchange
from m3d.tasks.evidence import Asking, value_words
from tests.fixtures.small_scan import GRID, block_scan


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.fixture(scope="module")
def model(taught):
    return m3d.load(taught, device="cpu")


@pytest.fixture(scope="module")
def scan(model):
    return model.look(block_scan())


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    mask = np.zeros(GRID, bool)
    mask[2:6, 4:12, 6:12] = True
    return mask


def test_a_name_gives_its_mask_on_the_scans_grid(scan, truth):
    result = scan.segment("block")
    (mask,) = result.masks
    assert mask.name == "block"
    assert mask.array.shape == scan.volume.shape and mask.array.dtype == bool
    assert dice(mask.array, truth) > 0.8
    assert mask.volume_ml == pytest.approx(mask.array.sum() * 4 * 2 * 2 / 1000)
    assert 0.5 < mask.score <= 1


def test_the_same_scan_stored_otherwise_gives_the_same_mask(model, truth):
    volume = block_scan()
    turned = Volume(
        np.ascontiguousarray(volume.array.transpose(2, 1, 0)[::-1]),
        volume.affine[:, [2, 1, 0, 3]] @ np.array([[-1.0, 0, 0, 23], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    )
    (mask,) = model.look(turned).segment("block").masks
    assert mask.array.shape == (24, 16, 8)
    assert dice(mask.array, truth.transpose(2, 1, 0)[::-1]) > 0.8


def test_every_mask_of_an_answer_has_its_own_name(scan):
    result = scan.ask("Draw both.")
    assert [mask.name for mask in result.masks] == ["block", "shadow"]
    assert result.masks[0].array.any()
    if not result.masks[1].array.any():
        assert any("'shadow' is empty" in warning for warning in result.warnings)


def test_an_answer_without_seg_is_an_error_that_repeats_it(scan):
    with pytest.raises(m3d.NoMask, match=r"no mask of 'ghost': the model answered 'There is no ghost in this scan\.'"):
        scan.segment("ghost")


def test_another_name_is_no_answer_and_no_name_is_the_one_asked_for(scan):
    with pytest.raises(m3d.NoMask, match="no mask of 'banana': the model drew 'block' instead"):
        scan.segment("banana")
    assert [mask.name for mask in scan.segment("thing").masks] == ["thing"]


def test_a_box_comes_in_voxels_and_mm(scan):
    (box,) = scan.locate("block").boxes
    assert box.name == "block"
    assert np.allclose(box.voxel.lo, (2, 4, 6)) and np.allclose(box.voxel.hi, (6, 12, 12))
    assert box.mm.frame == "mm"
    assert np.allclose(sorted(np.subtract(box.mm.hi, box.mm.lo)), sorted((16, 16, 12)))


def test_a_box_head_writes_the_digits_of_a_box(scan):
    """It reads the state at ``<bx_start>``: the last of what was said up to there."""
    box = torch.tensor([0.125, 0.5, 0.25, 0.875, 0.25, 0.75])  # its second side is the wrong way round
    read = []
    model = scan.model
    head = number_reader(model.config.text.hidden_size, 6)
    with torch.no_grad():
        head[-1].weight.zero_(), head[-1].bias.copy_(box.logit())
    head.register_forward_hook(lambda _, given, __: read.append(given[0]))
    said = scan.locate("block").text
    model.box_head = head
    try:
        found = scan.locate("block")
        report = scan.report()
    finally:
        model.box_head = None
    written = "<bx_start>[0.125, 0.250, 0.250, 0.875, 0.500, 0.750]<bx_end>"
    assert found.text == re.sub("<bx_start>.*<bx_end>", written, said) != said
    assert found.boxes[0].voxel.lo == pytest.approx((1, 4, 6), abs=0.02)
    assert found.boxes[0].voxel.hi == pytest.approx((7, 8, 18), abs=0.02)
    assert report.boxes == () and len(read) == 1  # nothing begins a box there
    upto = encode_exchange(scan.processor.tokenizer, scan.processor.write(found.prompt), said)[0]
    upto = torch.tensor([upto[: upto.index(model.config.box_start_token_id) + 1]])
    with torch.no_grad():
        features = {"image": model.get_image_features(scan.processor.pixels(scan.prepared)[None])}
        states = model(input_ids=upto, mm_encoder_outputs=features, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(read[0], states[:, -1], atol=1e-4, rtol=1e-3)


def test_a_box_that_was_not_ended_stays_as_it_is():
    boxes = torch.tensor([[0.0, 0, 0, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.2, 0.2, 0.2]])
    written = _written("One <bx_start>[9]<bx_end>, two <bx_start>[0.3, ", boxes)
    assert written == "One <bx_start>[0.000, 0.000, 0.000, 0.500, 0.500, 0.500]<bx_end>, two <bx_start>[0.3, "


def test_report_and_questions(scan):
    assert scan.report().text == "A bright block."
    assert scan.ask("Write a report of this scan.").text == "A bright block."
    with pytest.raises(ValueError, match="question is empty"):
        scan.ask("  ")


def test_an_answer_rests_on_what_was_measured_of_its_own_masks(scan, truth):
    found = scan.ask("How large is it?")
    assert found.text == "large"
    (mask,) = found.masks  # drawn for both measures, told once
    assert mask.name == "block" and dice(mask.array, truth) > 0.8
    volume, width = found.measured
    assert volume == FoundMeasure("volume", ("block",), pytest.approx(mask.volume_ml), "mL")
    across = np.ptp(np.argwhere(mask.array)[:, 2]) + 1  # voxels of 2 mm along the patient's left
    assert width == FoundMeasure("width", ("block",), pytest.approx(2 * across), "mm")
    assert str(volume) == f"block: volume {mask.volume_ml:.1f} mL"
    written = found.to_dict()
    assert [one["measure"] for one in written["measured"]] == ["volume", "width"]
    assert [one["name"] for one in written["masks"]] == ["block"]


def test_the_model_reads_the_values_that_were_measured(scan, monkeypatch):
    """Every word of its own is the one that it finds likeliest behind all before it, read without a cache."""
    read = []
    states = talking._states
    monkeypatch.setattr(talking, "_states", lambda scan, ids, asked: (read.append(ids), states(scan, ids, asked))[1])
    found, model, tokenizer = scan.ask("How large is it?"), scan.model, scan.processor.tokenizer
    ids = read[-1]
    asked = len(tokenizer(scan.processor.write("How large is it?"))["input_ids"])
    said = plain_words(tokenizer, ids[0, asked:].tolist())
    values = [f" {value_words(Asking(one.measure, one.names), one.value)}" for one in found.measured]
    assert said == f"block [SEG] volume:{values[0]}; block [SEG] width:{values[1]}. Answer: large"
    with torch.inference_mode():
        logits = model(input_ids=ids, mm_encoder_outputs={"image": scan.features}).logits[0]
    own = [place for place in range(asked, ids.shape[1]) if ids[0, place] == logits[place - 1].argmax()]
    given = tokenizer.decode([int(ids[0, place]) for place in range(asked, ids.shape[1]) if place not in own])
    assert not re.search("[a-z]", re.sub("mL|mm", "", given))  # only values are not what it would have said


def test_masks_of_the_answer_are_told_from_those_of_its_evidence(scan, truth):
    found = scan.ask("How far apart?")
    (distance,) = found.measured
    assert distance == FoundMeasure("distance", ("block", "shadow"), distance.value, "mm")
    assert [mask.name for mask in found.masks] == ["block", "shadow", "block"]
    assert dice(found.masks[0].array, truth) > 0.8 and dice(found.masks[2].array, truth) > 0.8
    if not found.masks[1].array.any():
        assert distance.value is None and any("'shadow' is empty" in warning for warning in found.warnings)


def test_a_blinded_scan_measures_what_it_drew_itself(scan):
    blind = scan.blinded()
    assert not blind.volume.array.any() and np.array_equal(blind.volume.affine, scan.volume.affine)
    found = blind.ask("How large is it?")
    drawn = {mask.name: mask.volume_ml for mask in found.masks}
    for one in found.measured[:1]:
        assert one.value == (pytest.approx(drawn["block"]) if drawn["block"] else None)


def test_what_shows_nothing_is_not_measured(scan, monkeypatch):
    draw = talking.draw

    def nothing(scan, names, text, geometry, **kept):
        masks, notes = draw(scan, names, text, geometry, **kept)
        return tuple(dataclasses.replace(mask, array=np.zeros_like(mask.array)) for mask in masks), notes

    monkeypatch.setattr(talking, "draw", nothing)
    found = scan.ask("How large is it?")
    assert [one.value for one in found.measured] == [None] * len(found.measured)
    assert str(found.measured[0]) == "block: volume not seen"


def test_questions_asked_together_are_answered_as_one_by_one(scan):
    questions = ["How far apart?", "Segment the ghost.", "How large is it?", "Where is the block?", "Draw both."]
    together = list(scan.ask_many(questions, keep_logits=True))
    for question, found in zip(questions, together, strict=True):
        alone = scan.ask(question)
        assert (found.text, found.evidence, found.prompt) == (alone.text, alone.evidence, question)
        assert found.measured == alone.measured and found.boxes == alone.boxes
        assert [mask.name for mask in found.masks] == [mask.name for mask in alone.masks]
        assert all((one.array == other.array).all() for one, other in zip(found.masks, alone.masks, strict=True))
        assert found.num_measured == len({name for one in found.measured for name in one.names})
        assert all(mask.logits is None for mask in found.masks[: found.num_measured])
        assert all(mask.logits.shape == scan.prepared.shape for mask in found.masks[found.num_measured :])
        assert all(mask.logits is None for mask in alone.masks)
    assert together[0].evidence == "block [SEG], shadow [SEG] distance: not seen" or together[0].measured


def test_asking_nothing_gives_nothing_and_an_empty_question_is_refused(scan):
    assert list(scan.ask_many([])) == []
    with pytest.raises(ValueError, match="question 2 of 2 is empty"):
        scan.ask_many(["Where is the block?", "  "])


def test_a_scan_shown_another_picture_answers_about_that_one(scan, truth):
    other = np.roll(scan.prepared.array, 8, axis=2)
    shown = scan.shown(other)
    assert shown.prepared.shape == scan.prepared.shape and np.array_equal(shown.volume.affine, scan.volume.affine)
    assert np.allclose(shown.prepared.array, other)
    seen, _ = (one.features.last_hidden_state for one in (shown, scan))
    assert torch.allclose(seen, scan.model.get_image_features(torch.from_numpy(other)[None, None]).last_hidden_state)
    with pytest.raises(ValueError, match="the model's grid"):
        scan.shown(other[1:])


def test_a_volume_on_the_grid_already_is_seen_as_it_lies(model, scan):
    again = type(scan).of_prepared(scan.model_id, scan.model, scan.processor, scan.prepared)
    assert torch.equal(again.features.last_hidden_state, scan.features.last_hidden_state)
    assert again.ask("Where is the block?").text == scan.ask("Where is the block?").text


def test_an_answer_that_measures_stays_within_its_tokens_and_is_an_answer_or_nothing(scan):
    said = set()
    for limit in range(1, 26):
        found = scan.ask("How large is it?", max_new_tokens=limit)
        said.add(found.text)
        if found.measured and not found.text:
            assert any(f"broken off at {limit} tokens" in warning for warning in found.warnings)
    assert {"", "large"} <= said
    assert not any("[SEG]" in text and "width" in text for text in said)


def test_the_volume_is_encoded_once(model, monkeypatch):
    seen = []
    for part in (model.model.vision_tower, model.model.vision_tower.detail):
        look = part.forward
        monkeypatch.setattr(part, "forward", lambda v, *found, look=look: (seen.append(len(v)), look(v, *found))[1])
    scan = model.look(block_scan())
    scan.report(), scan.segment("block"), scan.locate("block"), scan.segment(points=[((3, 6, 8), 1)])
    assert seen == [1, 1]  # by the detail network, then by the ViT


def test_points_and_boxes_draw_without_a_name(scan, truth):
    clicked = scan.segment(points=[((3, 7, 8), 1)]).masks[0]
    boxed = scan.segment(box=Box(lo=(2, 4, 6), hi=(6, 12, 12))).masks[0]
    assert clicked.name == "prompted by points" and boxed.name == "prompted by box"
    assert dice(boxed.array, truth) > 0.5


def test_a_name_and_geometry_reach_the_head_together(scan, monkeypatch):
    asked = []
    draw = scan.model.draw
    monkeypatch.setattr(scan.model, "draw", lambda *args, **kwargs: (asked.append(kwargs), draw(*args, **kwargs))[1])
    result = scan.segment("block", points=[((3, 7, 8), 0)], box=Box(lo=(2, 4, 6), hi=(6, 12, 12)))
    (given,) = asked
    assert [mask.name for mask in result.masks] == ["block"]
    assert given["text"].shape == (1, 16)  # what [SEG] says
    assert given["prompts"].points.tolist() == [[[3, 7, 8]]]  # the grid is the scan's own here
    assert given["prompts"].point_labels.tolist() == [[0]]
    assert given["prompts"].boxes.tolist() == [[2, 4, 6, 5, 11, 11]]  # half-open, as inclusive corners


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "say what to segment"),
        ({"name": " "}, "name is empty"),
        ({"points": [((3, 7, 80), 1)]}, r"point \(3, 7, 80\) lies outside the scan, whose voxels are \(8, 16, 24\)"),
        ({"points": [((3, 7, 8), 2)]}, "label is 1"),
        ({"box": Box(lo=(0, 0, 0), hi=(9, 3, 3))}, "must have lo < hi and lie in the scan"),
        ({"box": Box(lo=(3, 3, 3), hi=(3, 5, 5))}, "must have lo < hi"),
    ],
)
def test_wrong_prompts_are_refused(scan, wrong, said):
    with pytest.raises(ValueError, match=said):
        scan.segment(**wrong)


def test_a_point_and_a_box_may_be_in_mm(scan):
    at, box = (3, 7, 8), Box(lo=(2, 4, 6), hi=(6, 12, 12))
    mm = (scan.volume.affine @ [*at, 1])[:3].tolist()
    corners = np.array([scan.volume.affine @ [*np.subtract(corner, 0.5), 1] for corner in (box.lo, box.hi)])[:, :3]
    patient = Box(tuple(corners.min(axis=0)), tuple(corners.max(axis=0)), "mm")
    here = scan.segment(points=[(at, 1)], box=box).masks[0]
    there = scan.segment(points=[(mm, 1)], box=patient, frame="mm").masks[0]
    assert np.array_equal(here.array, there.array)
    larger = scan.segment(box=Box((-99, -99, -99), (99, 99, 99), "mm")).masks[0]
    assert np.array_equal(larger.array, scan.segment(box=Box((0, 0, 0), GRID)).masks[0].array), "cut to the scan"
    with pytest.raises(ValueError, match="frame='mm', but the box is in voxels"):
        scan.segment(points=[(mm, 1)], box=box, frame="mm")


def test_several_names_are_one_mask_each_and_what_is_refused_is_said(scan):
    found = scan.segment([" block", "ghost", "thing", "banana", "Block"])
    assert found.asked == ("block", "ghost", "thing", "banana")
    assert [mask.name for mask in found.masks] == ["block", "thing"]
    assert found.absent == ("ghost", "banana")
    ghost, banana = found.not_drawn
    assert ghost.reason == "the model answered 'There is no ghost in this scan.' without [SEG]"
    assert banana.reason == "the model drew 'block' instead; it may not know that name"
    for mask in found.masks:
        assert np.array_equal(mask.array, scan.segment(mask.name).masks[0].array)
    assert found.text.splitlines()[1:3] == ["There is no ghost in this scan.", "Sure, it is [SEG]."]


def test_more_names_than_are_asked_at_once_keep_their_order(scan, monkeypatch):
    asked, speak = [], talking.speak_all
    monkeypatch.setattr(talking, "speak_all", lambda scan, some, n: (asked.append(len(some)), speak(scan, some, n))[1])
    monkeypatch.setattr(talking, "AT_ONCE", 2)
    found = scan.segment(["ghost", "thing", "block"])
    assert asked == [2, 1] and found.asked == ("ghost", "thing", "block")
    assert [mask.name for mask in found.masks] == ["thing", "block"]


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        ([], {}, "no names"),
        (["block", " "], {}, "the name is empty"),
        (["block", "thing"], {"points": [((3, 7, 8), 1)]}, "a list of 2 names is given; ask for each by itself"),
        (["block"], {"box": Box(lo=(2, 4, 6), hi=(6, 12, 12))}, "points and a box are about one structure"),
    ],
)
def test_several_names_that_cannot_be_drawn_are_refused(scan, names, more, said):
    with pytest.raises(ValueError, match=said):
        scan.segment(names, **more)


def test_all_is_the_vocabulary_of_the_checkpoint(scan, monkeypatch):
    with pytest.raises(
        ValueError, match=r"taught does not say which structures it has learned \(seg_config\.vocabulary"
    ):
        scan.segment_all()
    monkeypatch.setattr(scan.model.config.seg, "vocabulary", ["block", "ghost"])
    found = scan.segment_all()
    assert scan.vocabulary == found.asked == ("block", "ghost") and found.absent == ("ghost",)
    assert scan.segment_all(["ghost", "thing"]).asked == ("ghost", "thing")


def test_masks_are_cleaned_where_that_is_asked_for(scan):
    large = PostProcess(min_volume_ml=50.0)
    for found in (scan.segment("block", postprocess=large), scan.segment(["block"], postprocess=large)):
        assert found.postprocess == (large,) and not found.masks[0].array.any()
    assert not scan.segment("block").postprocess


def test_a_blinded_scan_does_not_see(scan, truth):
    blind = scan.blinded()
    assert blind.model_id.endswith("(blind)")
    mask = blind.segment(box=Box(lo=(2, 4, 6), hi=(6, 12, 12))).masks[0]
    sharp = scan.segment(box=Box(lo=(2, 4, 6), hi=(6, 12, 12))).masks[0]
    assert not np.array_equal(mask.array, sharp.array)


def test_files_are_looked_at_like_volumes(model, scan, tmp_path):
    write_volume(tmp_path / "ct.nii.gz", block_scan())
    again = model.look(tmp_path / "ct.nii.gz")
    assert np.array_equal(again.segment("block").masks[0].array, scan.segment("block").masks[0].array)


def test_another_architecture_is_refused(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'llama' model; an 'm3d' checkpoint is needed"):
        m3d.load(tmp_path)


def test_a_missing_or_cut_checkpoint_is_named(taught, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model 'm3d-huge'"):
        m3d.load("m3d-huge")
    folder = tmp_path / "cut"
    shutil.copytree(taught, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ValueError, match="weights cannot be read"):
        m3d.load(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"not a whole M3D checkpoint: \*\.safetensors missing"):
        resolve(folder)


def test_weights_of_other_sizes_are_refused(taught, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(taught, folder)
    config = json.loads((folder / "config.json").read_text())
    config["seg_config"]["mask_prompt"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the weights do not fit config\.json"):
        m3d.load(folder)


def test_volumes_with_nan_are_refused():
    array = np.zeros(GRID, np.float32)
    array[1, 2, 3] = np.nan
    with pytest.raises(BadScan, match="1 voxels are NaN"):
        Volume(array, np.eye(4))


def test_unknown_device_is_refused(taught):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match="device 'cuda' is not available here; use one of: auto, cpu"):
        m3d.load(taught, device="cuda")


def test_likelihoods_are_those_of_the_answers_read_one_by_one(scan, model):
    prompt, answers = "Where is the block?", ["It is here.", "There is none at all in this scan."]
    processor, network = model.processor, model.model
    found = scan.log_likelihoods(prompt, answers)
    for answer, value in zip(answers, found, strict=True):
        ids, labels = encode_exchange(processor.tokenizer, processor.write(prompt), answer)
        with torch.inference_mode():
            logits = network(input_ids=torch.tensor([ids]), mm_encoder_outputs={"image": scan.features}).logits[0]
        odds = logits[:-1].log_softmax(dim=-1)
        expected = sum(odds[place, label] for place, label in enumerate(labels[1:]) if label >= 0)
        assert value == pytest.approx(float(expected), rel=1e-4)


def test_a_taught_answer_is_likelier_than_another(scan):
    taught = scan.ask("Where is the block?").text
    right, wrong = scan.log_likelihoods("Where is the block?", [taught, taught[::-1]])
    assert right > wrong


def test_no_answers_cannot_be_judged(scan):
    with pytest.raises(ValueError, match="at least one"):
        scan.log_likelihoods("Where is the block?", [])


def test_a_merged_prompt_draws_one_mask_for_all_names(scan):
    text = scan.text_prompt("block")
    (alone, _), (masks, notes) = draw(scan, ["block"], text, None), draw(scan, ["block", "ball"], text, None)
    assert [mask.name for mask in masks] == ["block", "ball"]
    assert all(np.array_equal(mask.array, alone[0].array) for mask in masks)
    assert any("one mask for all" in note for note in notes)
