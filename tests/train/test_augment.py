"""Augmentation leaves the text true: sides, boxes, label values, and the picture's own way back."""

import itertools

import numpy as np
import pytest
import torch

from data_prep.boxes import Box, box_of_mask
from data_prep.laterality import mirrored, speaks_of_sides
from data_prep.phantoms import head_neck
from data_prep.steps import transform_box, transform_points
from m3d.config import load_config
from m3d.train.augment import Augment

SPACING = (10.0, 10.0, 5.0)
STILL = {"rotate_degrees": 0, "shift_mm": 0, "gain": 0, "offset": 0, "noise": 0, "contrast": 0, "probability": 1.0}
RIGHT, LEFT = 3, 4  # parotids


@pytest.fixture(scope="module")
def patient():
    """A phantom whose axes grow to S, P and L, its image in [0, 1], and its labels."""
    case = head_neck(2, shape=(48, 48, 48), spacing=SPACING, orientation="SPL")
    image = ((case.volume.array + 200) / 600).clip(0, 1)
    return torch.from_numpy(image), torch.from_numpy(case.labels), dict(case.names)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half_of(labels: torch.Tensor, value: int) -> str:
    """The patient's half, by the array alone, in which a structure lies: W grows to the left."""
    place = np.argwhere(labels.numpy() == value)[:, -1].mean()
    return "left" if place > (labels.shape[-1] - 1) / 2 else "right"


def cuboid(box: Box, shape: tuple[int, int, int]) -> torch.Tensor:
    labels = torch.zeros(shape, dtype=torch.uint8)
    labels[tuple(slice(int(low), int(high)) for low, high in zip(box.lo, box.hi, strict=True))] = 7
    return labels


def hull(box: Box, matrix: np.ndarray) -> Box:
    """The axis-aligned hull of a box's eight corners after a motion; voxel edges lie half a voxel before indices."""
    corners = np.array(list(itertools.product(*zip(box.lo, box.hi, strict=True)))) - 0.5
    moved = transform_points(corners, matrix) + 0.5
    return Box(tuple(moved.min(axis=0)), tuple(moved.max(axis=0)))


def test_without_the_guard_the_left_parotid_lands_on_the_other_side(patient):
    image, labels, _ = patient
    assert (half_of(labels, LEFT), half_of(labels, RIGHT)) == ("left", "right")
    careless = Augment(**STILL, flip=1.0, mirror="unless_sided")
    done = careless(image, labels, SPACING, seeded(0), sides=False)  # though "left parotid" will be said
    assert (half_of(done.labels, LEFT), half_of(done.labels, RIGHT)) == ("right", "left")
    assert done.mirrored
    assert torch.equal(done.image, image.flip(2))
    assert torch.equal(done.labels, labels.flip(2))


@pytest.mark.parametrize("mirror", ["never", "unless_sided", "swap"])
def test_with_the_guard_sides_stay_where_they_are(patient, mirror):
    image, labels, _ = patient
    assert speaks_of_sides("left parotid")
    for seed in range(4):
        careful = Augment(flip=1.0, quarter_turn=1.0, mirror=mirror)
        done = careful(image, labels, SPACING, seeded(seed), sides=True, bound=frozenset())
        assert (half_of(done.labels, LEFT), half_of(done.labels, RIGHT)) == ("left", "right")
        assert not done.mirrored
        assert np.linalg.det(done.matrix) > 0


def test_swapped_labels_and_text_agree(patient):
    image, labels, names = patient
    done = Augment(**STILL, flip=1.0, mirror="swap")(image, labels, SPACING, seeded(0), sides=True, names=names)
    assert done.mirrored
    assert (half_of(done.labels, LEFT), half_of(done.labels, RIGHT)) == ("left", "right")  # a name still says where
    assert torch.equal(done.image, image.flip(2))
    before, after = labels.flip(2).numpy(), done.labels.numpy()
    text = mirrored("the left parotid")  # what was said of the left gland is said of the one that it became
    assert text == "the right parotid"
    value = next(value for value, name in names.items() if name in text)
    assert ((after == value) == (before == LEFT)).all()
    for value in set(names) - {LEFT, RIGHT}:
        assert ((after == value) == (before == value)).all()
    wide = torch.stack([labels, labels]).to(torch.uint16)
    again = Augment(**STILL, flip=1.0, mirror="swap")(image, wide, SPACING, seeded(0), sides=True, names=names)
    assert again.labels.dtype == torch.uint16
    assert np.array_equal(again.labels.numpy(), np.stack([after, after]))


def test_what_cannot_be_swapped_is_not_mirrored(patient):
    image, labels, _ = patient
    names = {LEFT: "left parotid", 7: "mandible"}  # nothing to call the mirrored gland
    swap = Augment(**STILL, flip=1.0, mirror="swap")
    assert torch.equal(swap(image, labels, SPACING, seeded(0), sides=True, names=names).image, image)
    assert swap(image, labels, SPACING, seeded(0), sides=False, names=names).mirrored


@pytest.mark.parametrize(
    ("sides", "bound", "orient", "flipped"),
    [
        (False, "", "SPL", (0, 1, 2)),
        (False, "", "RAS", (0, 1, 2)),
        (False, "", None, ()),
        (False, "S", "SPL", (1, 2)),
        (False, "A", "SPL", (0, 2)),
        (False, "AS", "LIP", (0,)),
        (False, "R", "SPL", ()),
        (True, "", "SPL", ()),
    ],
)
def test_axes_that_a_text_binds_are_not_flipped(patient, sides, bound, orient, flipped):
    image, labels, _ = patient
    augment = Augment(**STILL, flip=1.0, mirror="unless_sided")
    done = augment(image, labels, SPACING, seeded(0), sides=sides, bound=set(bound), orient=orient)
    assert torch.equal(done.image, image.flip(flipped))
    signs = [-1 if axis in flipped else 1 for axis in range(3)]
    starts = [47 if axis in flipped else 0 for axis in range(3)]
    assert np.array_equal(done.matrix[:3], np.column_stack([np.diag(signs), starts]))


def test_directions_count_as_spoken_of_unless_the_caller_read_the_texts(patient):
    image, labels, _ = patient
    done = Augment(**STILL, flip=1.0, quarter_turn=1.0)(image, labels, SPACING, seeded(0), sides=False)
    assert torch.equal(done.image, image)


def test_quarter_turns_keep_the_plane_and_what_binds_it_forbids_them():
    image = torch.rand(4, 6, 6, generator=seeded(0))
    labels = (image * 9).to(torch.uint8)
    augment = Augment(**STILL, quarter_turn=1.0)
    seen = set()
    for seed in range(12):
        done = augment(image, labels, (5, 2, 2), seeded(seed), sides=False, bound={"S"})
        turns = [k for k in (1, 2, 3) if torch.equal(done.image, image.rot90(k, (1, 2)))]
        assert torch.equal(done.labels, labels.rot90(turns[0], (1, 2)))
        seen |= set(turns)
    assert seen == {1, 2, 3}
    for bound, orient in (("A", "SPL"), ("R", "SPL"), ("S", "RSA"), ("", None)):
        done = augment(image, labels, (5, 2, 2), seeded(0), sides=False, bound=set(bound), orient=orient)
        assert torch.equal(done.image, image)


@pytest.mark.parametrize(("spacing", "turned"), [((5, 4, 2), (2, 2, 8)), ((5, 2, 2), (2, 4, 4))])
def test_a_quarter_turn_of_an_oblong_picture_stays_on_its_grid_and_true_in_mm(spacing, turned):
    labels = cuboid(Box((3, 3, 8), (5, 7, 12)), (8, 10, 20))  # 4 x 4 voxels around the middle
    augment = Augment(**STILL, quarter_turn=1.0)
    found = []
    for seed in range(8):
        done = augment(labels / 7, labels, spacing, seeded(seed), sides=False, bound=frozenset())
        found.append(box_of_mask(done.labels.numpy() == 7, ""))
        assert found[-1].center == (4, 5, 10)
    assert {box.sides for box in found} == {(2, 4, 4), turned}  # 16 x 8 mm become 8 x 16


def test_boxes_of_moved_masks_are_the_moved_boxes_on_1000_random_chains():
    rng = np.random.default_rng(5)
    shape = (28, 30, 26)
    moves = STILL | {"rotate_degrees": 8, "shift_mm": 6, "probability": 0.8}
    augment = Augment(**moves, flip=0.5, quarter_turn=0.5, mirror="unless_sided")
    generator, improper, worst = seeded(11), 0, 0.0
    for _ in range(1000):
        lo = rng.integers(8, 12, 3)
        box = Box(tuple(lo), tuple(lo + rng.integers(4, 10, 3)))
        plane = float(rng.uniform(1.5, 3))
        spacing = (float(rng.uniform(2, 5)), plane, plane * float(rng.uniform(0.9, 1.1)))
        labels = cuboid(box, shape)
        done = augment(labels / 7, labels, spacing, generator, sides=False, bound=frozenset())
        expected = hull(box, np.linalg.inv(done.matrix)).clip(shape)
        found = box_of_mask(done.labels.numpy() == 7, "")
        off = np.abs(np.subtract(found.lo + found.hi, expected.lo + expected.hi)).max()
        improper += np.linalg.det(done.matrix) < 0
        worst = max(worst, off)
    assert worst <= 1.0
    assert 350 < improper < 650


def test_boxes_follow_flips_and_turns_exactly():
    augment = Augment(**STILL, flip=0.5, quarter_turn=0.5, mirror="unless_sided")
    for seed in range(40):
        box = Box((2, 5, 1), (4, 6, 8))
        labels = cuboid(box, (7, 12, 12))
        done = augment(labels / 7, labels, (3, 2, 2), seeded(seed), sides=False, bound=frozenset())
        expected = transform_box(box, np.linalg.inv(done.matrix))
        found = box_of_mask(done.labels.numpy() == 7, "")
        assert np.allclose(found.lo + found.hi, expected.lo + expected.hi, atol=1e-9)


def test_the_motion_is_rigid_in_mm_and_small():
    image = torch.zeros(12, 10, 16)
    spacing = (5.0, 1.0, 2.0)
    augment = Augment(rotate_degrees=8, shift_mm=12, probability=1.0)
    for seed in range(20):
        matrix = augment(image, image, spacing, seeded(seed), sides=False).matrix
        scale = np.diag([*spacing, 1.0])
        in_mm = scale @ matrix @ np.linalg.inv(scale)
        turn = in_mm[:3, :3]
        assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-6)  # MONAI draws in float32
        assert np.linalg.det(turn) == pytest.approx(1)
        assert np.degrees(np.arccos((np.trace(turn) - 1) / 2)) <= 8 * 3
        middle = np.array([(side - 1) / 2 for side in image.shape])
        shift = (transform_points(middle[None], matrix)[0] - middle) * spacing
        assert np.linalg.norm(shift) <= 12 * 3**0.5 + 1e-4
    assert not np.allclose(turn, np.eye(3), atol=0.01)


def test_image_and_labels_are_where_the_matrix_says(patient):
    _, labels, _ = patient
    smooth = np.add.outer(np.add.outer(np.arange(48.0) * 2, np.arange(48.0)), np.arange(48.0) * 3) / 300 + 0.05
    image = torch.from_numpy(smooth).float()
    augment = Augment(**STILL | {"rotate_degrees": 10, "shift_mm": 15})
    done = augment(image, labels, SPACING, seeded(3), sides=True)
    places = np.argwhere(np.ones((20, 20, 20))) + 14
    before = transform_points(places, done.matrix)
    expected = before @ [2, 1, 3] / 300 + 0.05  # linear, so interpolation must be exact
    assert np.allclose(done.image.numpy()[tuple(places.T)], expected, atol=1e-4)
    nearest = labels.numpy()[tuple(np.rint(before).astype(int).T)]
    assert (done.labels.numpy()[tuple(places.T)] == nearest).mean() > 0.999  # halves may round either way


def test_label_values_are_never_mixed():
    values = torch.tensor([0, 1, 2, 128, 254, 255], dtype=torch.uint8)
    labels = values[torch.randint(6, (2, 10, 12, 14), generator=seeded(0))]
    done = Augment(probability=1.0)(labels[0] / 255, labels, (3, 1, 2), seeded(1), sides=True)
    assert done.labels.dtype == torch.uint8
    assert done.labels.shape == labels.shape
    assert set(done.labels.unique().tolist()) == set(values.tolist())
    wide = labels.to(torch.int32) + 60000 * (labels > 0)
    followed = Augment(probability=1.0)(labels[0] / 255, wide, (3, 1, 2), seeded(1), sides=True).labels
    assert torch.equal(followed, done.labels.to(torch.int32) + 60000 * (done.labels > 0))


def test_same_generator_state_same_case_and_no_other_source_of_chance(patient):
    image, labels, _ = patient
    augment = Augment(flip=0.5, quarter_turn=0.5, mirror="unless_sided")
    told = {"sides": False, "bound": frozenset()}
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    results = []
    for seed in (1, 1, 2):
        np.random.seed(len(results))
        torch.manual_seed(len(results))
        results.append(augment(image, labels, SPACING, seeded(seed), **told))
    first, again, other = results
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.labels, again.labels)
    assert np.array_equal(first.matrix, again.matrix)
    assert not torch.equal(first.image, other.image)
    np.random.seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    augment(image, labels, SPACING, seeded(5), **told)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)


def test_the_given_case_is_not_written_to(patient):
    image, labels, names = patient
    kept = image.clone(), labels.clone()
    for seed in range(3):
        Augment(flip=0.5, mirror="swap")(image, labels, SPACING, seeded(seed), sides=False, names=names)
    assert torch.equal(image, kept[0])
    assert torch.equal(labels, kept[1])
    assert type(image) is torch.Tensor


def test_intensity_stays_in_range_and_air_stays_black(patient):
    image, labels, _ = patient
    augment = Augment(rotate_degrees=0, shift_mm=0, gain=0.5, offset=0.4, noise=0.3, contrast=0.5, probability=1.0)
    done = augment(image, labels, SPACING, seeded(0), sides=True)
    assert type(done.image) is torch.Tensor
    assert done.image.dtype == torch.float32
    assert 0 <= float(done.image.min()) <= float(done.image.max()) <= 1
    assert (done.image[image == 0] == 0).all()
    assert not torch.equal(done.image, image)
    assert done.labels is labels


def test_hounsfield_units_in_the_text_forbid_another_contrast(patient):
    image, labels, _ = patient
    grey = image.clamp(0.3, 0.7)
    augment = Augment(rotate_degrees=0, shift_mm=0, gain=0.3, offset=0.2, noise=0.02, contrast=0.5, probability=1.0)
    told = augment(grey, labels, SPACING, seeded(0), sides=False, density=True)
    assert float((told.image - grey).mean().abs()) < 1e-3
    assert 0 < float((told.image - grey).std()) < 0.021
    untold = augment(grey, labels, SPACING, seeded(0), sides=False)
    assert float((untold.image - grey).mean().abs()) > 0.02


def test_nothing_is_done_by_amounts_of_zero(patient):
    image, labels, _ = patient
    for augment in (Augment(**STILL), Augment(probability=0.0)):
        done = augment(image, labels, SPACING, seeded(0), sides=False, bound=frozenset())
        assert torch.equal(done.image, image)
        assert torch.equal(done.labels, labels)
        assert np.array_equal(done.matrix, np.eye(4))


def test_by_default_nothing_is_flipped_or_turned(patient):
    image, labels, names = patient
    for seed in range(20):
        done = Augment()(image, labels, SPACING, seeded(seed), sides=False, bound=frozenset(), names=names)
        assert not done.mirrored
        assert np.diag(done.matrix).min() > 0.9


def test_it_reads_from_yaml_and_refuses_nonsense(tmp_path):
    path = tmp_path / "augment.yaml"
    path.write_text("gain: 0.1\noffset: 0.1\nflip: 0.1\nquarter_turn: 0.5\nprobability: 0.5\nmirror: unless_sided\n")
    read = load_config(Augment, path)
    assert read == Augment(gain=0.1, offset=0.1, flip=0.1, quarter_turn=0.5, probability=0.5, mirror="unless_sided")
    for nonsense, match in (
        ({"flip": 1.5}, "flip=1.5"),
        ({"noise": -1}, "noise=-1"),
        ({"mirror": "always"}, "mirror='always'"),
    ):
        with pytest.raises(ValueError, match=match):
            Augment(**nonsense)


def test_labels_on_other_voxels_are_refused():
    with pytest.raises(ValueError, match="do not lie on the voxels"):
        Augment()(torch.zeros(4, 4, 4), torch.zeros(4, 4, 5), (1, 1, 1), seeded(0), sides=False)
