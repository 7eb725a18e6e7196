"""Pointing, step by step: what changed, the way back, and what is refused; from a model that was really taught."""

import dataclasses
import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

import m3d
from data_prep.boxes import Box
from data_prep.preprocess import Foreground, MinMax, Preprocess
from data_prep.volume import Volume
from m3d.inference import talking
from m3d.inference.prompting import as_prompts, slice_box, spread, unseen
from m3d.inference.scan import Scan

GRID = (8, 16, 24)
BLOCK = Box(lo=(2, 4, 6), hi=(6, 12, 12))


@pytest.fixture(scope="module")
def model(taught):
    return m3d.load(taught, device="cpu")


@pytest.fixture(scope="module")
def volume() -> Volume:
    """A bright block on the grid's own voxels: index (d, h, w) lies at (7 - 2w, 5 - 2h, 4d + 1) mm."""
    array = np.random.default_rng(0).random(GRID, np.float32) * 0.2
    array[2:6, 4:12, 6:12] += 0.8
    array[0, 0, 0], array[-1, -1, -1] = 0.0, 1.0
    affine = np.array([[0.0, 0, -2, 7], [0, -2, 0, 5], [4, 0, 0, 1], [0, 0, 0, 1]])
    return Volume(array, affine)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    mask = np.zeros(GRID, bool)
    mask[2:6, 4:12, 6:12] = True
    return mask


@pytest.fixture(scope="module")
def scan(model, volume):
    return model.look(volume)


@pytest.fixture
def thing(scan):
    return scan.session().object("thing")


@pytest.fixture
def asked(scan, monkeypatch):
    """What the mask head is asked, in order."""
    said, draw = [], scan.model.draw
    monkeypatch.setattr(scan.model, "draw", lambda *args, **kwargs: (said.append(kwargs), draw(*args, **kwargs))[1])
    return said


@pytest.fixture
def unlearned(scan):
    """The same scan, whose head has no path for earlier masks."""
    encoder = scan.model.seg_head.prompt_encoder
    path, encoder.mask_embedding = encoder.mask_embedding, None
    yield scan
    encoder.mask_embedding = path


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def hull_of_difference(a: np.ndarray, b: np.ndarray) -> Box | None:
    where = np.argwhere(a != b)
    return Box(tuple(where.min(0).tolist()), tuple((where.max(0) + 1).tolist())) if len(where) else None


def given_points(prompts) -> list[list[float]]:
    return prompts.points[0].tolist()


# -- what a step gives ------------------------------------------------------------------------------------------------


def test_a_point_draws_and_says_what_it_changed(thing, truth):
    assert not thing.current.array.any() and thing.current.score == 0 and thing.current.changed is None
    step = thing.add_point((3, 7, 8))
    assert step is thing.current
    assert step.array.shape == GRID and dice(step.array, truth) > 0.5
    assert 0.5 < step.score <= 1 and step.milliseconds > 0
    assert step.mask.name == "thing"
    assert step.mask.volume_ml == pytest.approx(step.array.sum() * 4 * 2 * 2 / 1000)
    assert step.changed == hull_of_difference(np.zeros(GRID, bool), step.array)


def test_what_changed_is_the_box_of_the_symmetric_difference(thing):
    first = thing.add_point((3, 7, 8)).array
    second = thing.add_box(Box(lo=(0, 0, 4), hi=(8, 10, 12)))
    assert second.changed == hull_of_difference(first, second.array)
    drawn = np.zeros(GRID, bool)
    drawn[1:3, 4:6, 20:24] = True
    third = thing.add_mask(drawn)
    assert third.changed == hull_of_difference(second.array, drawn) is not None
    assert thing.add_mask(drawn).changed is None


def test_a_step_is_frozen(thing):
    step = thing.add_point((3, 7, 8))
    with pytest.raises(ValueError, match="read-only"):
        step.array[0, 0, 0] = True
    with pytest.raises(AttributeError):
        step.changed = None


def test_points_alone_are_those_of_segment(scan, thing):
    drawn = thing.add_point((3, 7, 8)).array
    assert np.array_equal(drawn, scan.segment(points=[((3, 7, 8), 1)]).masks[0].array)


def test_every_prompt_changes_what_the_head_answers(scan):
    """Logits on the grid, which move although a mask may not."""
    answers = []
    for say in (
        lambda one: one.add_point((3, 7, 8)),
        lambda one: (one.add_point((3, 7, 8)), one.add_point((0, 1, 20), positive=False)),
        lambda one: one.add_box(BLOCK),
        lambda one: one.add_slice_box(axis=0, at=3, lo=(4, 6), hi=(12, 12)),
        lambda one: one.add_scribble([(3, 5, 7), (3, 7, 9), (3, 9, 11)]),
        lambda one: one.add_name("block"),
    ):
        one = scan.session(feedback=False).object()
        say(one)
        answers.append(one._history.step.logits)
    for number, logits in enumerate(answers):
        assert all(not torch.allclose(logits, other, atol=1e-3) for other in answers[:number])


def test_the_same_steps_give_the_same_masks(scan):
    def steps():
        one = scan.session().object()
        one.add_name("block")
        one.add_point((0, 1, 20), positive=False)
        return one.add_box(BLOCK), one._history.step.logits

    (first, one), (second, other) = steps(), steps()
    assert np.array_equal(first.array, second.array) and torch.equal(one, other)
    assert (first.score, first.changed) == (second.score, second.changed)


# -- back and forth ---------------------------------------------------------------------------------------------------


def test_undo_gives_the_very_mask_and_redo_the_next(thing):
    blank = thing.current.array
    masks = [blank, thing.add_point((3, 7, 8)).array, thing.add_box(Box(lo=(0, 0, 4), hi=(8, 10, 12))).array]
    masks.append(thing.add_name("block").array)
    said = thing.current.given
    for earlier, later in zip(masks[-2::-1], masks[:0:-1], strict=True):
        step = thing.undo()
        assert np.array_equal(step.array, earlier) and step.changed == hull_of_difference(earlier, later)
    assert not thing.current.given and thing.current.score == 0
    for mask in masks[1:]:
        assert np.array_equal(thing.redo().array, mask)
    assert thing.current.given is said


def test_undone_prompts_are_not_told_again(thing, asked):
    thing.add_point((3, 7, 8))
    thing.add_point((5, 1, 1), positive=False)
    thing.undo()
    thing.add_box(BLOCK)
    assert given_points(asked[-1]["prompts"]) == [[3, 7, 8]]
    with pytest.raises(ValueError, match="nothing to redo"):
        thing.redo()


def test_after_an_undo_the_next_step_is_as_if_nothing_had_been(scan):
    plain, detour = scan.session().object(), scan.session().object()
    for one in (plain, detour):
        one.add_point((3, 7, 8))
    detour.add_box(Box(lo=(0, 0, 4), hi=(8, 10, 12)))
    detour.undo()
    for one in (plain, detour):
        one.add_point((5, 1, 1), positive=False)
    assert torch.equal(plain._history.step.logits, detour._history.step.logits)


def test_reset_forgets_and_can_be_undone(thing, asked):
    drawn = thing.add_point((3, 7, 8)).array
    step = thing.reset()
    assert not step.array.any() and not step.given and step.changed == hull_of_difference(drawn, step.array)
    assert np.array_equal(thing.undo().array, drawn)
    thing.redo()
    thing.add_point((5, 9, 9))
    assert given_points(asked[-1]["prompts"]) == [[5, 9, 9]] and asked[-1]["prompts"].mask is None


def test_there_is_nothing_before_the_beginning(thing):
    with pytest.raises(ValueError, match="nothing to undo"):
        thing.undo()
    with pytest.raises(ValueError, match="nothing to redo"):
        thing.redo()


# -- frames -----------------------------------------------------------------------------------------------------------


def test_a_point_in_mm_is_the_voxel_there(scan, asked):
    voxel, mm = scan.session().object(), scan.session().object()
    voxel.add_point((3, 7, 8))
    mm.add_point((7 - 2 * 8, 5 - 2 * 7, 4 * 3 + 1), frame="mm")
    assert given_points(asked[1]["prompts"]) == given_points(asked[0]["prompts"]) == [[3, 7, 8]]
    assert mm.current.given.points == (((3.0, 7.0, 8.0), 1),)
    assert np.array_equal(voxel.current.array, mm.current.array)


def test_a_box_in_mm_is_that_in_voxels(thing, asked):
    """Edge ``i`` lies half a voxel before index ``i``: w 6..12 is x from 7 - 2 * 11.5 to 7 - 2 * 5.5."""
    thing.add_box(Box(lo=(-16, -18, 7), hi=(-4, -2, 23), frame="mm"))
    assert thing.current.given.box == BLOCK
    assert asked[0]["prompts"].boxes.tolist() == [[2, 4, 6, 5, 11, 11]]


def test_a_box_on_a_slice_is_one_voxel_thin(thing, volume, asked):
    thing.add_slice_box(axis=1, at=7, lo=(2, 6), hi=(6, 12))
    assert thing.current.given.box == Box(lo=(2, 7, 6), hi=(6, 8, 12))
    assert asked[0]["prompts"].boxes.tolist() == [[2, 7, 6, 5, 7, 11]]
    # The patient's A axis is the array's second, and y = 5 - 2 * 7 is its index 7.
    in_mm = slice_box(volume, axis=1, at=-9, lo=(-16, 7), hi=(-4, 23), frame="mm")
    assert in_mm == thing.current.given.box
    # S is the array's first: z = 4 * 3 + 1 is index 3.
    assert slice_box(volume, axis=2, at=13, lo=(-16, -18), hi=(-4, -2), frame="mm") == Box((3, 4, 6), (4, 12, 12))


# -- scribbles --------------------------------------------------------------------------------------------------------


def test_a_scribble_is_reduced_to_points_that_are_spread(thing, asked):
    thing.add_scribble([(4, 8, w) for w in range(6, 17)], most=3)
    assert sorted(given_points(asked[0]["prompts"])) == [[4, 8, 6], [4, 8, 11], [4, 8, 16]]
    assert asked[0]["prompts"].point_labels.tolist() == [[1, 1, 1]]
    thing.undo()
    thing.add_scribble(np.array([(4, 8, 2), (4, 8, 2)]), positive=False)
    assert asked[1]["prompts"].point_labels.tolist() == [[0]]  # the same voxel twice is one


def test_spreading_goes_by_mm_and_begins_in_the_middle():
    places = [(0.0, 0.0, 0.0), (0.0, 0.0, 3.0), (1.0, 0.0, 1.0)]
    assert spread(places, 2, (1, 1, 1)) == (places[2], places[1])  # sqrt(5) beside sqrt(2)
    # In mm the third lies at (9, 0, 1): the middle is (3, 0, 4/3), 3.43 from the second and farther from the others.
    assert spread(places, 2, (9, 1, 1))[1] == places[2]
    assert spread(places, 9, (1, 1, 1))[2] == places[0] and len(spread(places, 9, (1, 1, 1))) == 3
    with pytest.raises(ValueError, match="most=0"):
        spread(places, 0, (1, 1, 1))


# -- names, masks and feedback ----------------------------------------------------------------------------------------


def test_a_name_is_asked_for_once(scan, truth, asked, monkeypatch):
    spoken, speak = [], talking.speak_all
    monkeypatch.setattr(talking, "speak_all", lambda scan, *said: (spoken.append(said), speak(scan, *said))[1])
    session = scan.session()
    block = session.object("block")
    assert dice(block.add_name().array, truth) > 0.8  # its label, where no name is given
    block.add_point((3, 7, 8))
    session.object("other").add_name("Block")
    assert len(spoken) == 1
    assert [one["text"].shape for one in asked] == [(1, 16)] * 3
    assert torch.equal(asked[0]["text"], asked[1]["text"])


def test_a_refused_name_changes_nothing(thing):
    before = thing.add_point((3, 7, 8))
    with pytest.raises(m3d.NoMask, match="no mask of 'ghost'"):
        thing.add_name("ghost")
    with pytest.raises(ValueError, match="name is empty"):
        thing.add_name(" ")
    assert thing.current is before
    thing.undo()
    with pytest.raises(ValueError, match="nothing to undo"):
        thing.undo()


def test_the_answer_so_far_is_a_prompt_of_the_next(scan, asked):
    fed, unfed = scan.session().object(), scan.session(feedback=False).object()
    for one in (fed, unfed):
        one.add_point((3, 7, 8))
    first = fed._history.step.logits
    for one in (fed, unfed):
        one.add_point((5, 1, 1), positive=False)
    alone, _, again, without = asked
    assert alone["prompts"].mask is None and without["prompts"].mask is None
    assert torch.equal(again["prompts"].mask[0, 0], first)
    assert not torch.allclose(fed._history.step.logits, unfed._history.step.logits, atol=1e-3)


def test_another_name_is_answered_without_the_mask_drawn_before(thing, asked):
    thing.add_point((3, 7, 8))
    thing.add_name("block")
    assert asked[-1]["prompts"].mask is None and given_points(asked[-1]["prompts"]) == [[3, 7, 8]]


@pytest.mark.parametrize("feedback", [True, False])
def test_a_mask_is_what_it_is_until_it_is_refined(scan, truth, asked, feedback):
    one = scan.session(feedback=feedback).object()
    step = one.add_mask(truth.astype(np.uint8))
    assert np.array_equal(step.array, truth) and step.score == 1 and not asked
    one.add_point((3, 7, 8))
    told = asked[0]["prompts"].mask[0, 0]
    assert torch.equal(told > 0, torch.from_numpy(truth)) and told.unique().tolist() == [-16, 8]
    one.add_point((4, 7, 8))
    assert torch.equal(asked[1]["prompts"].mask[0, 0], told) is not feedback


def test_a_head_without_a_mask_prompt_is_not_told_masks(unlearned, truth, asked):
    one = unlearned.session().object()
    one.add_point((3, 7, 8))
    one.add_point((5, 1, 1), positive=False)
    assert asked[1]["prompts"].mask is None
    with pytest.raises(ValueError, match=r"has not learned to use an earlier mask .*give points, a box or a name"):
        one.add_mask(truth)
    with pytest.raises(ValueError, match=r"has not learned .*leave out feedback"):
        unlearned.session(feedback=True)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda one: one.add_point((3, 7, 80)), r"point \(3, 7, 80\) lies outside the scan, .*frame='mm'"),
        (
            lambda one: one.add_point((3, 7, 80), frame="mm"),
            r"point \(3, 7, 80\) mm, which is voxel \(19.8, -1, 2\), lies",
        ),
        (lambda one: one.add_point((3, np.nan, 8)), "point needs three finite numbers"),
        (lambda one: one.add_point((3, 8)), "point needs three finite numbers"),
        (lambda one: one.add_point((3, 7, 8), frame="norm"), "unknown frame 'norm' of a prompt; known: voxel, mm"),
        (lambda one: one.add_point((3, 7, 8), positive=False), r"\(3, 7, 8\) is said to be inside and outside: .*undo"),
        (lambda one: one.add_point((3.2, 7, 7.8), positive=False), r"voxel \(3, 7, 8\) has a point of either kind"),
        (lambda one: one.add_point((3, 13, 8)), r"point \(3, 13, 8\) is said to be inside, but .*outside the box"),
        (lambda one: one.add_box(Box((0, 0, 0), (3, 7, 8))), r"point \(3, 7, 8\) .*give a box that holds the point"),
        (lambda one: one.add_box(Box((0, 0, 0), (9, 9, 9))), r"box \(0, 0, 0\) to \(9, 9, 9\) .*lie in the scan"),
        (lambda one: one.add_box(Box((0, 0), (9, 9))), "a box needs three sides"),
        (lambda one: one.add_box(Box((3, 3, 3), (3, 9, 9))), "must have lo < hi"),
        (lambda one: one.add_slice_box(axis=0, at=8, lo=(0, 0), hi=(9, 9)), "no slice 8 on axis 0: .*0 to 7"),
        (lambda one: one.add_slice_box(axis=3, at=0, lo=(0, 0), hi=(9, 9)), "axis 0, 1 or 2"),
        (lambda one: one.add_scribble([(3, 7, 8), (3, 7, 24)]), r"voxel of a scribble \(3, 7, 24\) lies outside"),
        (lambda one: one.add_scribble([]), "voxel of a scribble needs three"),
        (lambda one: one.add_scribble([(3, 7, w) for w in range(6, 16)]), "outside the box"),
        (lambda one: one.add_mask(np.zeros(GRID, bool)), "the mask is empty"),
        (lambda one: one.add_mask(np.ones((8, 16, 23), bool)), "bring it to the scan's grid"),
        (lambda one: one.add_mask(np.full(GRID, 3)), "give one label, as labels == 3"),
    ],
)
def test_a_refused_prompt_changes_nothing(thing, asked, wrong, said):
    thing.add_point((3, 7, 8))
    before = thing.add_box(BLOCK)
    thing.add_point((0, 0, 0), positive=False)
    last = thing.undo()
    with pytest.raises(ValueError, match=said):
        wrong(thing)
    assert thing.current is last and np.array_equal(last.array, before.array) and len(asked) == 3
    thing.redo()  # what was undone is still there
    assert len(thing.current.given.points) == 2


def test_segment_refuses_contradictions_too(scan):
    with pytest.raises(ValueError, match="inside and outside"):
        scan.segment(points=[((3, 7, 8), 1), ((3, 7, 8), 0)])
    with pytest.raises(ValueError, match="outside the box"):
        scan.segment(points=[((3, 13, 8), 1)], box=BLOCK)


def test_what_the_model_does_not_look_at_is_moved_and_told(model, volume):
    """Cropped to the voxels above 0.5, the grid begins at the block; a corner of the scan lies outside."""
    cropped = Preprocess(grid=GRID, orientation=None, intensity=MinMax(), crop=Foreground(above=0.5))
    array = volume.array.copy()
    array[0, 0, 0] = array[-1, -1, -1] = 0.0
    prepared = cropped.apply(Volume(array, volume.affine))
    assert prepared.crop == BLOCK and not unseen(prepared, (2, 4, 6)) and unseen(prepared, (1, 4, 6))
    scan = Scan.of_prepared("taught", model.model, model.processor, prepared)
    step = scan.session().object().add_point((0, 0, 0), positive=False)
    assert any("(0, 0, 0) lies in a part of the scan that the model does not look at" in note for note in step.notes)
    on_grid = as_prompts(prepared, [((0.0, 0.0, 0.0), 0), ((5.0, 11.0, 11.0), 1)], None).points[0]
    assert on_grid[0].tolist() == [0, 0, 0]
    assert on_grid[1].tolist() == pytest.approx([6.5, 14.5, 21.5])  # 4, 8, 6 voxels, each stretched over 2, 2, 4


# -- several objects, and what is kept --------------------------------------------------------------------------------


def test_objects_are_independent(scan, asked):
    session = scan.session()
    one, other = session.object("one"), session.object("other")
    first = one.add_point((3, 7, 8))
    other.add_point((3, 7, 8), positive=False)  # no contradiction: it is another object
    other.add_box(Box(lo=(0, 0, 14), hi=(4, 4, 20)))
    assert one.current is first and session.object(" one ") is one
    other.undo()
    assert one.current is first and given_points(asked[2]["prompts"]) == [[3, 7, 8]]
    assert [each.label for each in session.objects] == ["one", "other"]
    session.remove("other")
    assert session.objects == (one,)
    with pytest.raises(ValueError, match="no object 'other' in this session; there are: one"):
        session.remove("other")
    session.reset()
    assert session.objects == () and session.object().label == "object"
    with pytest.raises(ValueError, match="label is empty"):
        session.object(" ")


def test_the_result_is_an_answer_that_can_be_saved(scan, tmp_path):
    session = scan.session()
    session.object("untouched")
    with pytest.raises(ValueError, match="no object has a prompt yet"):
        session.result()
    left = session.object("left").add_point((3, 7, 8))
    right = session.object("right").add_box(BLOCK)
    result = session.result()
    assert [mask.name for mask in result.masks] == ["left", "right"]
    assert result.prompt == "left: inside (3, 7, 8); right: box (2, 4, 6) to (6, 12, 12)"
    assert result.seconds == pytest.approx((left.milliseconds + right.milliseconds) / 1000)
    result.save(tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert kept["task"] == "session" and [mask["file"] for mask in kept["masks"]] == ["left.nii.gz", "right.nii.gz"]
    written = np.asarray(nib.load(tmp_path / "out" / "left.nii.gz").dataobj)
    assert np.array_equal(written > 0, left.array)


def test_the_image_is_encoded_exactly_once(model, volume):
    looks = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: looks.append("forward"))
    look = model.model.vision_tower.look
    model.model.vision_tower.look = lambda *given: (looks.append("look"), look(*given))[1]
    try:
        session = model.look(volume).session()
        assert sorted(looks) == ["forward", "look"]
        one = session.object()
        one.add_point((3, 7, 8))
        one.add_box(BLOCK)
        session.object("other").add_name("block")
        one.undo()
        session.result()
    finally:
        hook.remove()
        del model.model.vision_tower.look
    assert sorted(looks) == ["forward", "look"]


def test_a_model_without_a_head_has_no_sessions(scan):
    headless = dataclasses.replace(scan, model=SimpleNamespace(seg_head=None))
    with pytest.raises(ValueError, match="has no mask head"):
        headless.session()
