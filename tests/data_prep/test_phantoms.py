"""The phantom is what it says: closed-form volumes, sides by the affine, one patient on every grid."""

import itertools
import math
import time

import numpy as np
import pytest

from data_prep.analytic import Canvas, Pose, arch, capsule, ellipsoid, plate, rotation, stack, tube
from data_prep.anatomy import BRAINSTEM, LARYNX_HALF, LARYNX_POWER, PAROTID_HALF, PAROTID_POWER, Anatomy
from data_prep.derived import facts
from data_prep.phantoms import NAMES, head_neck

WHOLE = {"shape": (64, 48, 100), "spacing": (4.0, 4.0, 4.0)}  # P, L, I: all organs, not the shoulders


def superellipsoid_ml(half, power):
    return 8 * math.prod(half) * math.gamma(1 + 1 / power) ** 3 / math.gamma(1 + 3 / power) / 1000


def tube_ml(rows):
    """Integral of pi * half_r * half_a, both linear between rows (Simpson is exact)."""
    total = 0.0
    for (s0, _, _, r0, a0), (s1, _, _, r1, a1) in itertools.pairwise(rows):
        total += math.pi * (s0 - s1) / 6 * (r0 * a0 + (r0 + r1) * (a0 + a1) + r1 * a1)
    return total / 1000


def painted_ml(shape, pose=None, spacing=1.0, side=110):
    pose = pose or Pose(turn=np.eye(3), offset=np.zeros(3))
    affine = np.diag([spacing] * 3 + [1.0])
    middle = (np.array(shape.lo) + shape.hi) / 2
    dr, da = pose.shear(middle[2:])
    middle[:2] += [dr[0], da[0]]
    affine[:3, 3] = (pose.to_patient @ [*middle, 1])[:3] - spacing * (
        (side - 1) / 2 + 0.37
    )  # no face on a voxel's middle
    canvas = Canvas(pose, (side,) * 3, affine)
    canvas.paint(shape, 5.0, 1)
    assert set(np.unique(canvas.hu[canvas.labels == 1])) == {5.0}
    return np.count_nonzero(canvas.labels) * spacing**3 / 1000


SHAPES = {
    "ellipsoid": (ellipsoid((3, -2, 1), (12, 20, 26)), 4 / 3 * math.pi * 12 * 20 * 26 / 1000),
    "turned": (ellipsoid((3, -2, 1), (12, 20, 26), power=1.7, yaw=30), superellipsoid_ml((12, 20, 26), 1.7)),
    "tube": (tube([(30, 0, 0, 8, 6), (0, 5, 5, 8, 6), (-20, 0, -9, 12, 10)]),
             tube_ml([(30, 0, 0, 8, 6), (0, 5, 5, 8, 6), (-20, 0, -9, 12, 10)])),
    "capsule": (capsule((0, 0, 0), (10, 20, 20), 7), (math.pi * 49 * 30 + 4 / 3 * math.pi * 343) / 1000),
    "plate": (plate([(20, 0, -10, 10), (-20, 6, -10, 20)], thick=4), 8 * 40 * 25 / 1000),
    "stack": (stack([(20, 20, -10, 0, 15, 2, 2), (-20, 20, -10, 0, 15, 2, 2)]), math.pi * 15 * 30 / 2 * 40 / 1000),
    "shrunk stack": (stack([(20, 20, -10, 0, 15, 2, 2), (-20, 20, -10, 0, 15, 2, 2)], shrink=5),
                     math.pi * 10 * (15 + 5) / 2 * 35 / 1000),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_its_closed_form_volume(name):
    shape, known = SHAPES[name]
    assert painted_ml(shape) == pytest.approx(known, rel=0.025)
    assert painted_ml(shape.mirrored()) == pytest.approx(known, rel=0.025)
    assert painted_ml(shape.scaled(1.1, (0, 0, 0)).moved((5, 5, 5))) == pytest.approx(known * 1.331, rel=0.025)


@pytest.mark.parametrize("name", SHAPES)
def test_a_pose_turns_and_bends_but_keeps_the_volume(name):
    shape, known = SHAPES[name]
    pose = Pose(
        size=1.05, turn=rotation((8, -5, 12)), offset=np.array([9.0, 30, -7]), lean=0.3, stoop=0.2, sway=6.0, phase=1.0
    )
    assert painted_ml(shape.moved((20, 0, -90)), pose) == pytest.approx(known * 1.05**3, rel=0.025)


def test_an_arch_is_a_horseshoe_open_behind():
    shape = arch([(0, 30, 0), (30, 30, 0), (30, -20, 0)], thick=3, tall=8)
    walls = 2 * (30 + 50) * superellipse_mm2(3, 8, 4)
    turns = 2 * 3**2 * 8 * 0.8740  # the integral of the squared half thickness: 0.8740 is that of sqrt(1 - x^4)
    known = walls + math.pi * turns - 2 * (1 - math.pi / 4) * turns  # two round ends, two corners
    assert painted_ml(shape) == pytest.approx(known / 1000, rel=0.025)
    zero = np.zeros(1, np.float32)
    assert shape.inside(zero, zero + 30, zero).all()
    assert not shape.inside(zero, zero - 20, zero).any()


def superellipse_mm2(half_a, half_b, power):
    return 4 * half_a * half_b * math.gamma(1 + 1 / power) ** 2 / math.gamma(1 + 2 / power)


def test_rotation_turns_about_r_then_a_then_s():
    assert np.allclose(rotation((0, 0, 90)) @ [1, 0, 0], [0, 1, 0])
    assert np.allclose(rotation((90, 0, 0)) @ [0, 1, 0], [0, 0, 1])
    assert np.allclose(rotation((90, 0, 90)) @ [0, 1, 0], [0, 0, 1])
    assert np.isclose(np.linalg.det(rotation((10, 20, 30))), 1)


@pytest.mark.parametrize("seed", [3, 4])
def test_labels_have_the_volume_of_the_drawn_organs(seed):
    anatomy = Anatomy.draw(np.random.default_rng(seed))
    case = head_neck(seed, shape=(85, 64, 133), spacing=(3.0, 3.0, 3.0), without=["mandible"])
    found, scale = facts(case), anatomy.pose.size**3
    for name in ("right parotid", "left parotid", "larynx"):
        half, power = (LARYNX_HALF, LARYNX_POWER) if name == "larynx" else (PAROTID_HALF, PAROTID_POWER)
        known = superellipsoid_ml(half, power) * anatomy.grow[name] ** 3 * scale
        assert found[name].volume_ml == pytest.approx(known, rel=0.03)
    known = tube_ml(BRAINSTEM) * anatomy.grow["brainstem"] ** 2 * scale
    assert found["brainstem"].volume_ml == pytest.approx(known, rel=0.03)


def test_left_is_the_patients_left_and_every_organ_is_in_its_place():
    for seed in range(3):
        for codes, shape in (("PLI", (64, 48, 100)), ("RAS", (48, 64, 100))):
            case = head_neck(seed, shape=shape, spacing=(4.0, 4.0, 4.0), orientation=codes)
            at = {}
            for name in NAMES.values():
                at[name] = case.volume.to_mm(np.argwhere(case.mask(name))).mean(axis=0)
            assert at["left parotid"][0] < at["brainstem"][0] - 30 < at["right parotid"][0] - 60  # R grows to the right
            assert at["brainstem"][2] > at["right parotid"][2] > at["larynx"][2] > at["esophagus"][2]
            assert at["mandible"][1] > at["larynx"][1] > at["esophagus"][1] > at["spinal cord"][1]
            assert [facts(case)[name].side for name in ("left parotid", "brainstem", "larynx", "mandible")] == [
                "left",
                "midline",
                "midline",
                "midline",
            ]


@pytest.fixture(scope="module")
def drawn():
    return [head_neck(seed) for seed in range(4)]


def test_the_same_seed_is_the_same_patient(drawn):
    one, two, other = drawn[1], head_neck(1), drawn[2]
    assert np.array_equal(one.volume.array, two.volume.array)
    assert np.array_equal(one.labels, two.labels)
    assert np.array_equal(one.volume.affine, two.volume.affine)
    assert one.volume.shape != other.volume.shape or not np.array_equal(one.labels, other.labels)


def test_every_grid_shows_the_same_patient():
    coarse = head_neck(2, **WHOLE)
    other = head_neck(2, shape=(65, 80, 130), spacing=(3.0, 3.0, 3.0), orientation="RAS")
    for name, fact in facts(coarse).items():
        again = facts(other)[name]
        assert np.allclose(fact.centroid_mm, again.centroid_mm, atol=4.0), name
        assert fact.volume_ml == pytest.approx(again.volume_ml, rel=0.1), name


def test_shape_spacing_and_orientation_are_honoured(drawn):
    case = head_neck(1, shape=(40, 50, 60), spacing=(6.0, 5.0, 4.0), orientation="SAL")
    assert case.volume.shape == case.labels.shape == (40, 50, 60)
    assert np.allclose(case.volume.spacing, (6.0, 5.0, 4.0))
    assert case.volume.orientation == "SAL"
    turned = head_neck(1, orientation="IPL")
    assert turned.volume.shape == tuple(drawn[1].volume.shape[axis] for axis in (2, 0, 1))


def test_the_default_layout_is_openkbps(drawn):
    for volume in (case.volume for case in drawn):
        assert volume.orientation == "PLI"
        assert volume.shape[:2] == (128, 128)
        assert 48 <= volume.shape[2] <= 128
        assert volume.spacing[0] == pytest.approx(volume.spacing[1])
        assert 3.9 <= volume.spacing[0] <= 5.1
        assert 2.0 <= volume.spacing[2] <= 3.0
        assert -1000 <= volume.array.min() <= -990
        assert volume.array.max() <= 3000


@pytest.mark.parametrize("name", NAMES.values())
def test_without_leaves_one_out_and_nothing_else(name):
    whole, less = head_neck(3, **WHOLE), head_neck(3, **WHOLE, without=[name])
    assert whole.complete and less.complete
    assert whole.mask(name).any()
    assert not less.mask(name).any()
    assert name not in facts(less)
    changed = whole.labels != less.labels
    assert changed[whole.mask(name)].all()
    assert set(np.unique(less.labels[changed])) <= {0, 3, 4}  # the jaw may have hidden the edge of a parotid
    here, there = whole.volume.array[whole.mask(name)], less.volume.array[whole.mask(name)]
    assert np.abs(here - there).mean() > 3  # and it is gone from the picture


def test_a_phantom_can_lack_everything():
    case = head_neck(0, **WHOLE, without=list(NAMES.values()))
    assert not case.labels.any()
    assert (case.volume.array > 0).any()


MEDIANS = {
    "brainstem": (15, 50),
    "spinal cord": (15, 65),
    "right parotid": (-70, 60),
    "left parotid": (-70, 60),
    "esophagus": (-30, 80),
    "larynx": (-150, 110),
    "mandible": (350, 1000),
}


def test_organs_have_plausible_hounsfield_units():
    for seed in range(4):
        case = head_neck(seed, **WHOLE)
        for name, (low, high) in MEDIANS.items():
            assert low <= np.median(case.volume.array[case.mask(name)]) <= high, (seed, name)
        air = case.volume.array[case.mask("larynx")]
        assert (air < -600).mean() > 0.05  # the airway runs through the larynx


def test_both_answers_to_whether_the_cord_runs_out_occur(drawn):
    assert {facts(case)["spinal cord"].touches_edge for case in drawn} == {True, False}


def test_nonsense_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no 'larinx'.*larynx"):
        head_neck(0, without=["larinx"])
    for codes in ("PLX", "PLL", "PL", "pli"):
        with pytest.raises(ValueError, match="orientation"):
            head_neck(0, orientation=codes)
    with pytest.raises(ValueError, match="spacing"):
        head_neck(0, spacing=(0.0, 1.0, 1.0))


def test_a_phantom_is_quick():
    head_neck(0)
    started = time.process_time()
    head_neck(0, shape=(128, 128, 80), spacing=(3.9, 3.9, 3.0))
    assert time.process_time() - started < 2.0  # 0.2 s on a free core


# Medians of uncut OpenKBP contours: mL, and mm along R, A, S from between the parotids
REAL = {
    "brainstem": (26.0, (0, -22, 43)),
    "spinal cord": (26.0, (0, -46, -92)),
    "right parotid": (25.3, (58, 0, 0)),
    "left parotid": (24.3, (-58, 0, 0)),
    "esophagus": (11.6, (-4, -24, -135)),
    "larynx": (24.1, (-1, 11, -76)),
    "mandible": (62.7, (0, 46, -13)),
}


def test_phantoms_resemble_the_real_patients():
    seen = {name: [] for name in REAL}
    for seed in range(20):
        found = facts(head_neck(seed, **WHOLE))
        middle = np.add(found["left parotid"].centroid_mm, found["right parotid"].centroid_mm) / 2
        for name, fact in found.items():
            seen[name].append([fact.volume_ml, *(fact.centroid_mm - middle)])
    for name, (ml, place) in REAL.items():
        made = np.median(seen[name], axis=0)
        assert made[0] == pytest.approx(ml, rel=0.35), name
        assert np.linalg.norm(made[1:] - place) < 12, name
