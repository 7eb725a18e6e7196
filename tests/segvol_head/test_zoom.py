"""Zoom out, zoom in: the reference's numbers (fixture segflow), and answers known by construction."""

import pytest
import torch

from segvol_head import Prompts
from segvol_head.prompts import box_of, sample_points
from segvol_head.zoom import zoom

WINDOW = (8, 12, 16)
LEFT_KIDNEY = [1, 68, 150, 231, 216, 100, 140, 113, 299]
"""How the reference's stand-in tokenizer wrote "A computerized tomography of a left kidney." (fixture segvol_a)."""


class Recorder:
    """A decoder that remembers what it was shown and asked."""

    def __init__(self, decode):
        self.decode, self.shown, self.asked = decode, [], []

    def __call__(self, image, prompts):
        self.shown.append(image[0, 0])
        self.asked.append(prompts)
        return self.decode(image, prompts)


def bright(image, prompts):
    """Segment what is bright, whatever is asked."""
    return (10 * (image - 0.5)).expand(len(prompts), -1, -1, -1, -1)


def blob(shape, where):
    volume = torch.zeros(shape)
    volume[tuple(slice(a, b) for a, b in where)] = 1
    return volume


# --- parity ---


@torch.no_grad()
@pytest.mark.parametrize("mode", ["text", "box", "boxtext", "point"])
def test_all_four_modes_are_the_references(segflow, mode):
    inputs, outputs = segflow.inputs, segflow.outputs
    model = segflow.segvol()
    recorder = Recorder(lambda image, prompts: model.decode(model.encode(image), prompts))
    generator = torch.Generator().manual_seed(0)
    shrunk_label = inputs["zoom_out_label"][0] > 0
    given = {}
    if "text" in mode:
        given["text"] = segflow.text_embedding(torch.tensor([LEFT_KIDNEY]))
    if "box" in mode:
        given["boxes"] = box_of(shrunk_label)[None]
        assert torch.equal(given["boxes"], outputs[f"{mode}/zoom_out_box"])
    if mode == "point":
        points, labels = sample_points(shrunk_label, positive=3, negative=3, generator=generator)
        given |= {"points": points[None], "point_labels": labels[None]}
        assert torch.equal(given["points"], outputs["point/zoom_out_points"])
        assert torch.equal(given["point_labels"], outputs["point/zoom_out_point_labels"])

    (answer,) = zoom(
        inputs["volume"].float() / 255,
        Prompts(**given),
        recorder,
        window=segflow.image_size,
        overlap=segflow.config["infer_overlap"],
        compatibility="published",
        generator=generator,
    )

    assert torch.equal(recorder.shown[0], inputs["zoom_out_image"][0])
    assert len(recorder.asked) == outputs[f"{mode}/n_decoder_calls"].item()
    region = [side.start for side in answer.region] + [side.stop - 1 for side in answer.region]
    assert region == outputs[f"{mode}/roi"].tolist()
    if mode != "text":
        assert torch.equal(torch.cat([asked.boxes for asked in recorder.asked[1:]]), outputs[f"{mode}/window_boxes"])
    if mode == "point":
        assert torch.equal(torch.cat([asked.points for asked in recorder.asked[1:]]), outputs["point/window_points"])
    for ours, name in ((answer.global_logits, "zoom_out_"), (answer.logits, "")):
        torch.testing.assert_close(ours, outputs[f"{mode}/{name}logits"], atol=2e-5, rtol=1e-4)
        mask, label = ours > 0, inputs["label"] > 0
        dice = 2 * (mask & label).sum() / (mask.sum() + label.sum() + 1)
        torch.testing.assert_close(dice, outputs[f"{mode}/{name}dice"], atol=1e-6, rtol=0)


# --- known answers ---


@pytest.mark.parametrize("compatibility", [None, "published"])
@pytest.mark.parametrize("shape", [(8, 12, 16), (20, 40, 33), (5, 30, 9), (4, 7, 9)])
def test_zooming_in_recovers_every_voxel(shape, compatibility):
    volume = blob(shape, [(1, 4), (2, 6), (3, 8)])
    prompts = Prompts(text=torch.zeros(1, 4))
    (answer,) = zoom(volume, prompts, bright, window=WINDOW, compatibility=compatibility)
    assert torch.equal(answer.logits > 0, volume > 0)


def test_the_region_is_a_whole_window_even_at_the_border():
    volume = blob((16, 24, 40), [(0, 3), (20, 24), (14, 20)])
    (exact,) = zoom(volume, Prompts(text=torch.zeros(1, 4)), bright, window=WINDOW)
    sizes = [side.stop - side.start for side in exact.region]
    assert sizes == [8, 12, 16]
    (published,) = zoom(volume, Prompts(text=torch.zeros(1, 4)), bright, window=WINDOW, compatibility="published")
    assert published.region[1].stop - published.region[1].start < 12


def test_nothing_found_is_not_looked_at_again():
    recorder = Recorder(bright)
    (answer,) = zoom(torch.zeros(20, 20, 20), Prompts(text=torch.zeros(1, 4)), recorder, window=WINDOW)
    assert answer.region is None
    assert len(recorder.asked) == 1
    assert torch.equal(answer.logits, answer.global_logits)


def test_a_click_on_what_the_first_glance_missed_is_looked_at():
    """A single bright voxel vanishes when the volume is shrunk; pointing at it brings it back."""
    volume = torch.zeros(40, 60, 80)
    volume[30, 20, 50] = 1
    where = (torch.tensor([30.0, 20, 50]) + 0.5) * torch.tensor(WINDOW) / torch.tensor(volume.shape) - 0.5
    prompts = Prompts(points=where[None, None], point_labels=torch.ones(1, 1))
    recorder = Recorder(bright)
    (answer,) = zoom(volume, prompts, recorder, window=WINDOW)
    assert (answer.global_logits > 0).sum() == 0
    assert torch.equal(answer.logits > 0, volume > 0)
    local = recorder.asked[1].points[0, 0].round().long()
    assert recorder.shown[1][tuple(local)] == 1


def test_points_and_boxes_land_on_the_same_voxels_in_every_window():
    volume = blob((24, 40, 50), [(3, 18), (5, 35), (8, 44)])
    volume[10, 20, 25] = 7  # what is pointed at
    volume[12, 30, 40] = 9  # what is pointed away from
    scale = torch.tensor(volume.shape) / torch.tensor(WINDOW)
    points = (torch.tensor([[10.0, 20, 25], [12, 30, 40], [-1, -1, -1]]) + 0.5) / scale - 0.5
    recorder = Recorder(bright)
    prompts = Prompts(text=torch.zeros(1, 4), points=points[None], point_labels=torch.tensor([[1, 0, -1]]))
    (answer,) = zoom(volume, prompts, recorder, window=WINDOW)
    seen = {1: 0, 0: 0}
    for image, asked in zip(recorder.shown[1:], recorder.asked[1:], strict=True):
        pointed = {} if asked.points is None else zip(asked.points[0], asked.point_labels[0].tolist(), strict=True)
        for where, label in pointed:
            assert image[tuple(where.round().long())] == (7 if label else 9)
            seen[label] += 1
        assert (asked.points is not None) == bool((image > 1).any())
        off = (asked.boxes[0] - box_of(image > 0.5)).abs()
        assert bool((off <= scale.ceil().repeat(2)).all())  # the first glance is no sharper than its voxels
    assert min(seen.values()) >= 1
    assert torch.equal(answer.logits > 0, volume > 0)


def test_a_box_in_one_window_is_the_users_own():
    volume = blob((16, 24, 32), [(6, 9), (8, 12), (10, 20)])
    box = torch.tensor([[3.0, 4, 5, 4, 5, 9]])  # in the shrunk volume, half as fine: voxels 6-9, 8-11, 10-19
    recorder = Recorder(bright)
    (answer,) = zoom(volume, Prompts(boxes=box), recorder, window=WINDOW)
    offset = torch.tensor([side.start for side in answer.region] * 2)
    assert (recorder.asked[1].boxes[0] + offset).tolist() == [6, 8, 10, 9, 11, 19]


def test_a_box_that_the_first_glance_missed_goes_to_every_window_that_it_reaches():
    volume = torch.zeros(16, 24, 96)
    volume[6:9, 8:12, ::12] = 1  # too thin along the last axis, of which the window shows a sixth
    recorder = Recorder(lambda image, prompts: bright(image, prompts) - 6 * (len(recorder.asked) == 1))
    box = torch.tensor([[2.0, 3, 1, 5, 7, 14]])  # voxels 4-11, 6-15, 6-89
    (answer,) = zoom(volume, Prompts(boxes=box), recorder, window=WINDOW)
    assert (answer.global_logits > 0).sum() == 0 and torch.equal(answer.logits > 0, volume > 0)
    asked = torch.cat([asked.boxes for asked in recorder.asked[1:]])
    assert len(asked) > 3 and {tuple(row) for row in asked[:, [2, 5]].tolist()} >= {(0.0, 15.0)}


def test_a_region_thinner_than_the_window_shifts_published_prompts_only():
    """Quirk B10: the reference pads the image and not the prompt map."""
    volume = blob((4, 24, 32), [(1, 3), (8, 12), (10, 20)])
    box = torch.tensor([[2.0, 4, 5, 5, 5, 9]])
    boxes = {}
    for compatibility in (None, "published"):
        recorder = Recorder(bright)
        list(zoom(volume, Prompts(boxes=box), recorder, window=WINDOW, compatibility=compatibility))
        inside = box_of(recorder.shown[1] > 0.5)
        boxes[compatibility] = (recorder.asked[1].boxes[0] - inside)[[0, 3]].tolist()
    assert boxes == {None: [0, 0], "published": [-2, -2]}  # the window is 8 deep, the volume 4: 2 on either side


def test_a_window_that_nothing_is_asked_about_keeps_the_first_glance():
    """Two blobs, far apart: between them there is no box, and so no question."""
    volume = blob((8, 12, 100), [(2, 6), (3, 9), (0, 10)]) + blob((8, 12, 100), [(2, 6), (3, 9), (90, 100)])
    recorder = Recorder(bright)
    whole = Prompts(boxes=torch.tensor([[0.0, 0, 0, 7, 11, 15]]))
    (answer,) = zoom(volume, whole, recorder, window=WINDOW)
    assert all((image > 0.5).any() for image in recorder.shown)
    middle = (slice(None), slice(None), slice(40, 60))
    assert torch.equal(answer.logits[middle], answer.global_logits[middle])
    recorder = Recorder(bright)
    list(zoom(volume, whole, recorder, window=WINDOW, compatibility="published"))
    assert any(asked.boxes[0].tolist() == [-1.0] * 6 for asked in recorder.asked)


def test_prompts_are_answered_one_by_one_after_a_single_first_glance():
    recorder = Recorder(bright)
    volume = blob((8, 12, 16), [(1, 4), (2, 6), (3, 8)])
    answers = zoom(volume, Prompts(text=torch.eye(3, 4)), recorder, window=WINDOW)
    next(answers)
    assert [len(asked) for asked in recorder.asked] == [3, 1]
    assert len(list(answers)) == 2
    assert [asked.text[0].argmax().item() for asked in recorder.asked[1:]] == [0, 1, 2]
    assert list(zoom(volume, Prompts(text=torch.zeros(0, 4)), recorder, window=WINDOW)) == []


def test_an_overview_that_exists_is_used():
    recorder, overview = Recorder(bright), torch.rand(WINDOW)
    list(zoom(torch.zeros(9, 9, 9), Prompts(text=torch.zeros(1, 4)), recorder, window=WINDOW, overview=overview))
    assert torch.equal(recorder.shown[0], overview)


def test_what_cannot_be_zoomed_is_refused_at_once():
    volume, one = torch.zeros(9, 9, 9), Prompts(text=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"volume must be \(D, H, W\)"):
        zoom(volume[None], one, bright, window=WINDOW)
    with pytest.raises(ValueError, match="overview must have the window's shape"):
        zoom(volume, one, bright, window=WINDOW, overview=volume)
    with pytest.raises(ValueError, match="compatibility='old'"):
        zoom(volume, one, bright, window=WINDOW, compatibility="old")
    masked = Prompts(mask=torch.zeros(1, 1, *WINDOW))
    with pytest.raises(ValueError, match="no earlier mask"):
        zoom(volume, masked, bright, window=WINDOW)
    both = Prompts(boxes=torch.zeros(1, 6), points=torch.zeros(1, 1, 3), point_labels=torch.ones(1, 1))
    with pytest.raises(ValueError, match="either points or a box"):
        zoom(volume, both, bright, window=WINDOW, compatibility="published")
    with pytest.raises(ValueError, match="decode must give"):
        list(zoom(volume, one, lambda image, prompts: image[..., :2], window=WINDOW))
