"""Preprocess: what the model sees, and the way back, against answers that other code or a formula gives."""

from __future__ import annotations

import itertools
import json
import pickle

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from data_prep.boxes import Box, box_of_mask
from data_prep.preprocess import Foreground, Percentile, Preprocess, Window
from data_prep.steps import View, crop, reorient
from data_prep.volume import BadScan, Volume

CT = Window(-1000.0, 400.0)


def noise(shape: tuple[int, int, int] = (9, 14, 11), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def itk_image(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """The array (i, j, k) with its RAS affine as an ITK image (LPS)."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def itk_resampled(array: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], onto: np.ndarray, order: int):
    how = sitk.sitkLinear if order else sitk.sitkNearestNeighbor
    target = itk_image(np.zeros(shape, np.float32), onto)
    image = sitk.Resample(itk_image(array.astype(np.float32), affine), target, sitk.Transform(), how, -1e6)
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0)


# ---- orientation and crop: exact


def test_reorientation_is_nibabels(posed):
    image, _, affine = posed
    turned, turn = reorient(Volume(image, affine), "SPL")
    change = ornt_transform(io_orientation(affine), axcodes2ornt("SPL"))
    assert np.array_equal(turned.array, apply_orientation(image, change))
    assert np.allclose(turned.affine, affine @ nib.orientations.inv_ornt_aff(change, image.shape), atol=1e-12)
    assert turned.orientation == "SPL"
    assert np.array_equal(turn.undo(turned.array), image)


def test_every_pair_of_orientations():
    array = noise((3, 4, 5))
    codes = ["".join(p) for axes in itertools.permutations(("RL", "AP", "SI")) for p in itertools.product(*axes)]
    assert len(codes) == 48
    for code in codes:
        turned, turn = reorient(Volume(array, np.eye(4)), code)
        change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(code))
        assert np.array_equal(turned.array, apply_orientation(array, change))
        assert turned.orientation == code
        assert np.array_equal(turn.undo(turned.array), array)


def test_crop_moves_the_origin_and_comes_back_with_fill():
    array = noise((4, 5, 6))
    cut, back = crop(Volume(array, np.diag([2.0, 3.0, 4.0, 1.0])), Box((1, 2, 3), (3, 5, 6)))
    assert cut.affine[:3, 3].tolist() == [2.0, 6.0, 12.0]
    full = back.undo(cut.array, fill=-9.0)
    assert np.array_equal(full[1:3, 2:5, 3:6], array[1:3, 2:5, 3:6])
    assert np.count_nonzero(full == -9.0) == array.size - 2 * 3 * 3


# ---- the whole chain in ten poses


def test_what_lies_on_the_grid_is_what_lies_there_in_the_patient(posed, phantom):
    """No resampling needed: the grid holds exactly the phantom drawn on the grid's own affine."""
    image, labels, affine = posed
    spacing = reorient(Volume(image, affine), "SPL")[0].spacing
    prepared = Preprocess(grid=(36, 36, 36), intensity=CT, crop=Foreground(-500, 3), spacing=spacing).apply(
        Volume(image, affine)
    )
    expected = phantom.labels((36, 36, 36), prepared.affine)
    assert np.array_equal(prepared.mask_to_grid(labels), expected)
    values = (phantom.image((36, 36, 36), prepared.affine) + 1000) / 1400
    assert np.allclose(prepared.array, values, atol=1e-6)
    assert np.array_equal(prepared.mask_to_scan(expected), labels)  # and back, exactly
    assert prepared.warnings == ()


@pytest.mark.parametrize(
    "chain",
    [
        Preprocess(grid=(32, 40, 24), intensity=CT),
        Preprocess(grid=(32, 40, 24), intensity=CT, crop=Foreground(-500, 4.0)),
        Preprocess(grid=(40, 44, 48), intensity=CT, crop=Foreground(-500, 4.0), spacing=(2.0, 1.7, 1.9)),
        Preprocess(grid=(48, 44, 48), intensity=CT, orientation=None, spacing=(1.5, 1.7, 1.6)),
        Preprocess(grid=(16, 16, 16), intensity=CT, spacing=(1.0, 1.0, 1.0)),
    ],
    ids=["stretch", "stretch-crop", "spacing-crop", "keep-axes", "coarsened"],
)
def test_scan_to_grid_to_scan_stays_within_half_a_voxel(posed, chain: Preprocess):
    image, labels, affine = posed
    volume = Volume(image, affine)
    prepared = chain.apply(volume)
    back = prepared.mask_to_scan(prepared.mask_to_grid(labels))
    assert back.shape == labels.shape
    assert back.dtype == labels.dtype
    # a voxel may change only if another label lies within half a grid voxel of its centre
    grid_mm = np.linalg.norm(prepared.affine[:3, :3], axis=0)
    reach = [1 if mm <= 1.001 * own else int(np.ceil(mm / own / 2)) for mm, own in _per_axis(prepared, grid_mm, volume)]
    for moved in np.argwhere(back != labels):
        near = labels[tuple(slice(max(m - r, 0), m + r + 1) for m, r in zip(moved, reach, strict=True))]
        assert len(np.unique(near)) > 1
    for label in (1, 2, 3):
        drift = np.argwhere(back == label).mean(axis=0) - np.argwhere(labels == label).mean(axis=0)
        half = np.array([mm / 2 for mm, _ in _per_axis(prepared, grid_mm, volume)])
        assert (np.abs(drift) * volume.spacing <= half).all()


def _per_axis(prepared, grid_mm, volume):
    """For each scan axis: the grid's voxel size along it, and its own."""
    turn = prepared.steps[0].axes
    return [(grid_mm[turn.index(axis)], volume.spacing[axis]) for axis in range(3)]


def test_points_boxes_and_masks_agree(posed):
    image, labels, affine = posed
    prepared = Preprocess(grid=(64, 64, 64), intensity=CT, crop=Foreground(-500, 6.0), spacing=(0.7, 0.7, 0.7)).apply(
        Volume(image, affine)
    )
    on_grid = prepared.mask_to_grid(labels)
    for label in (1, 2, 3):
        scan_mask, grid_mask = labels == label, on_grid == label
        centre = prepared.points_to_grid([np.argwhere(scan_mask).mean(axis=0)])[0]
        assert np.abs(centre - np.argwhere(grid_mask).mean(axis=0)).max() < 0.5
        box, seen = prepared.box_to_grid(box_of_mask(scan_mask)), box_of_mask(grid_mask)
        assert np.allclose(box.lo, seen.lo, atol=0.51)  # half a grid voxel: the grid's edges fall between
        assert np.allclose(box.hi, seen.hi, atol=0.51)
        again = prepared.box_to_scan(box)
        assert np.allclose(again.lo, box_of_mask(scan_mask).lo, atol=1e-9)
        assert np.allclose(again.hi, box_of_mask(scan_mask).hi, atol=1e-9)


def test_points_have_the_same_millimetres_on_both_sides(posed):
    image, _, affine = posed
    prepared = Preprocess(grid=(20, 24, 28), intensity=CT, crop=Foreground(-500)).apply(Volume(image, affine))
    scan = np.random.default_rng(0).uniform(0, 22, (50, 3))
    grid = prepared.points_to_grid(scan)
    here = scan @ affine[:3, :3].T + affine[:3, 3]
    assert np.allclose(grid @ prepared.affine[:3, :3].T + prepared.affine[:3, 3], here, atol=1e-9)
    assert np.allclose(prepared.points_to_scan(grid), scan, atol=1e-9)


# ---- interpolation against other implementations


@pytest.mark.parametrize("grid", [(4, 8, 6), (9, 14, 11), (32, 40, 24), (5, 30, 11), (1, 1, 1)])
def test_stretching_is_torchs_trilinear(grid):
    array = noise()
    prepared = Preprocess(grid=grid, orientation=None).apply(Volume(array, np.eye(4)))
    mapped = (array - array.min()) / (array.max() - array.min())
    expected = F.interpolate(torch.from_numpy(mapped)[None, None], grid, mode="trilinear", align_corners=False)
    assert np.abs(prepared.array - expected[0, 0].numpy()).max() < 2e-6


def test_coarsening_is_torchs_antialiased_linear():
    array = noise((12, 60, 44))
    prepared = Preprocess(grid=(12, 20, 16), orientation=None, intensity=Window(-9, 9), spacing=(1, 3.0, 2.75)).apply(
        Volume(array, np.eye(4))
    )
    mapped = torch.from_numpy((array + 9) / 18)[None]  # slices as channels: the smoothing is within (H, W)
    expected = F.interpolate(mapped, (20, 16), mode="bilinear", align_corners=False, antialias=True)[0].numpy()
    assert np.abs(prepared.array - expected).max() < 2e-6


def test_finer_grid_is_simpleitks_linear_resampling(tilted):
    affine = np.eye(4)
    affine[:3, :3] = tilted((10.0, 20.0, -15.0)) * (3.0, 1.5, 2.0)
    array = noise((10, 12, 14))
    prepared = Preprocess(grid=(40, 30, 40), orientation=None, intensity=Window(-8, 8), spacing=(1, 1, 1)).apply(
        Volume(array, affine)
    )
    expected = itk_resampled((array + 8) / 16, affine, (40, 30, 40), prepared.affine, order=1)
    known = expected > -1e5
    assert known.sum() > 9 * 11 * 13 * 9 * 0.8
    assert np.abs(prepared.array - expected)[known].max() < 1e-4


def test_back_on_the_scan_is_simpleitks_linear_resampling(posed):
    image, _, affine = posed
    prepared = Preprocess(grid=(16, 18, 20), intensity=CT).apply(Volume(image, affine))
    logits = noise((16, 18, 20), seed=1)
    back = prepared.to_scan(logits, fill=-7.0)
    assert back.dtype == np.float32
    expected = itk_resampled(logits, prepared.affine, image.shape, affine, order=1)
    known = expected > -1e5  # SimpleITK knows nothing beyond the outer voxel centres; we repeat the edge
    assert known.mean() > 0.7
    assert np.abs(back - expected)[known].max() < 1e-4
    assert back.min() > -7.0


def test_a_linear_field_survives_both_ways():
    """Linear interpolation reproduces a linear field exactly, so any offset of the grid would show."""
    affine = np.diag([2.0, 1.0, 1.5, 1.0])
    field = np.indices((20, 30, 26)).astype(np.float32)
    volume = Volume(field.sum(axis=0), affine)
    prepared = Preprocess(grid=(64, 64, 64), orientation=None, intensity=Window(0, 100), spacing=(0.9, 0.8, 1.3)).apply(
        volume
    )
    grid = np.argwhere(np.ones((64, 64, 64), bool))
    scan = prepared.points_to_scan(grid)
    inner = ((scan >= 0) & (scan <= np.array(volume.shape) - 1)).all(axis=1)
    assert np.allclose(prepared.array.reshape(-1)[inner] * 100, scan[inner].sum(axis=1), atol=1e-3)
    outer = prepared.to_scan(prepared.array) * 100
    assert np.allclose(outer[1:-1, 1:-1, 1:-1], volume.array[1:-1, 1:-1, 1:-1], atol=1e-3)


# ---- crop, padding, fit


def test_what_the_crop_cut_away_gets_the_fill_value():
    array = np.zeros((10, 10, 10), np.float32)
    array[2:5, 3:7, 4:6] = 1 + noise((3, 4, 2)) ** 2
    prepared = Preprocess(grid=(6, 8, 4), orientation=None, crop=Foreground()).apply(Volume(array, np.eye(4)))
    assert prepared.crop == Box((2, 3, 4), (5, 7, 6))
    back = prepared.to_scan(np.ones((6, 8, 4)), fill=-50.0)
    inside = np.zeros(array.shape, bool)
    inside[2:5, 3:7, 4:6] = True
    assert (back[inside] == 1.0).all()
    assert (back[~inside] == -50.0).all()


def test_margin_is_in_millimetres_and_ends_at_the_border():
    array = np.zeros((10, 10, 10), np.float32)
    array[4:6, 4:6, 1:3] = 5.0
    array[4, 4, 1] = 4.0
    prepared = Preprocess(grid=(4, 4, 4), orientation=None, crop=Foreground(2.0, margin_mm=3.0)).apply(
        Volume(array, np.diag([3.0, 2.0, 1.0, 1.0]))
    )
    assert prepared.crop == Box((3, 2, 0), (7, 8, 6))  # 1, 2 and 3 voxels


def test_padding_is_the_lowest_intensity_and_the_middle_is_untouched():
    array = noise((4, 5, 6)) + 20
    prepared = Preprocess(grid=(8, 8, 8), orientation=None, intensity=Window(0, 40), spacing=(1, 1, 1)).apply(
        Volume(array, np.eye(4))
    )
    assert np.allclose(prepared.array[2:6, 1:6, 1:7], array / 40)
    prepared.array[2:6, 1:6, 1:7] = 0
    assert not prepared.array.any()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 40)] * 3),
    grid=st.tuples(*[st.integers(1, 24)] * 3),
    voxel=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    spacing=st.one_of(st.none(), st.tuples(*[st.floats(0.3, 6.0)] * 3)),
    codes=st.sampled_from(["SPL", "RAS", "AIL", None]),
)
def test_nothing_is_ever_cut_off(shape, grid, voxel, spacing, codes):
    prepared = Preprocess(grid=grid, orientation=codes, intensity=Window(-5, 5), spacing=spacing).apply(
        Volume(noise(shape), np.diag([*voxel, 1.0]))
    )
    whole = prepared.box_to_grid(Box((0, 0, 0), shape))
    assert min(whole.lo) >= -1e-6
    assert all(high <= side + 1e-6 for high, side in zip(whole.hi, grid, strict=True))
    if spacing is None:
        assert np.allclose(whole.lo, 0)
        assert np.allclose(whole.hi, grid)
    else:  # centred to within one grid voxel
        assert all(
            abs(low - (side - high)) <= 1 + 1e-4 for low, high, side in zip(whole.lo, whole.hi, grid, strict=True)
        )
    assert 0.0 <= prepared.array.min() <= prepared.array.max() <= 1.0
    ones = prepared.mask_to_scan(np.ones(grid, np.uint8))
    assert ones.shape == shape
    assert ones.all()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 20)] * 3),
    codes=st.sampled_from(["SPL", "RAS", "AIL", "LPI"]),
    seed=st.integers(0, 99),
)
def test_padding_round_trip_is_exact(shape, codes, seed):
    mask = np.random.default_rng(seed).integers(0, 4, shape, dtype=np.uint8)
    affine = np.diag([-1.1, 2.2, 3.3, 1.0])
    turned, _ = reorient(Volume(noise(shape), affine), codes)
    chain = Preprocess(grid=(24, 23, 21), orientation=codes, intensity=Window(-5, 5), spacing=turned.spacing)
    prepared = chain.apply(Volume(noise(shape), affine))
    assert np.array_equal(prepared.mask_to_scan(prepared.mask_to_grid(mask)), mask)
    back = prepared.to_scan(prepared.array) * 10 - 5
    assert np.allclose(back, noise(shape), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(shape=st.tuples(*[st.integers(2, 12)] * 3), factor=st.tuples(*[st.integers(1, 4)] * 3), seed=st.integers(0, 99))
def test_a_finer_grid_loses_nothing(shape, factor, seed):
    mask = np.random.default_rng(seed).integers(0, 4, shape, dtype=np.uint8)
    grid = tuple(side * times for side, times in zip(shape, factor, strict=True))
    prepared = Preprocess(grid=grid, orientation=None).apply(Volume(noise(shape), np.eye(4)))
    assert np.array_equal(prepared.mask_to_scan(prepared.mask_to_grid(mask)), mask)


def test_a_rounded_header_spacing_is_not_a_reason_to_interpolate():
    array = noise((8, 8, 8))
    voxel = 3.9059998989105225
    prepared = Preprocess(grid=(8, 8, 8), orientation=None, intensity=Window(-9, 9), spacing=(3.906,) * 3).apply(
        Volume(array, np.diag([voxel] * 3 + [1.0]))
    )
    assert np.allclose(prepared.array, (array + 9) / 18, atol=1e-7)
    assert prepared.affine[0, 0] == voxel


# ---- intensity


def test_intensities_by_hand():
    array = np.arange(-2000, 2000, 500, dtype=np.float32).reshape(2, 2, 2)
    window = Preprocess(grid=(2, 2, 2), orientation=None, intensity=Window(-1000, 1000)).apply(Volume(array, np.eye(4)))
    assert window.array.ravel().tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert window.intensity == {"kind": "window", "lo": -1000, "hi": 1000, "min": -2000, "max": 1500}
    middle = Preprocess(grid=(2, 2, 2), orientation=None, intensity=Percentile(0, 50)).apply(Volume(array, np.eye(4)))
    assert (middle.intensity["lo"], middle.intensity["hi"]) == (-2000, -250)
    assert middle.array.ravel()[:4] == pytest.approx([0, 500 / 1750, 1000 / 1750, 1500 / 1750])


def test_window_is_the_same_for_every_scan_whatever_else_is_in_it():
    tissue, metal = np.full((4, 4, 4), 40.0), np.full((4, 4, 4), 40.0)
    tissue[0], metal[0] = -1000, -1000
    metal[3, 3, 3] = 20000
    chain = Preprocess(grid=(4, 4, 4), orientation=None, intensity=CT)
    one, two = (chain.apply(Volume(array, np.eye(4))) for array in (tissue, metal))
    assert one.array[2, 2, 2] == two.array[2, 2, 2]


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (Preprocess(grid=(4, 4, 4), crop=Foreground(above=500)), "nothing is above 500"),
        (Preprocess(grid=(4, 4, 4), intensity=Window(100, 200)), "outside the intensity limits 100 to 200"),
        (Preprocess(grid=(4, 4, 4), intensity=Percentile(98, 99)), "coincide at 0"),
    ],
)
def test_a_scan_with_nothing_to_see_is_refused(chain: Preprocess, message: str):
    array = np.zeros((9, 9, 9))
    array[4, 4, 4] = -3.0
    with pytest.raises(BadScan, match=message):
        chain.apply(Volume(array, np.eye(4)))


def test_warnings():
    chain = Preprocess(grid=(4, 8, 8), intensity=CT, spacing=(1, 1, 1))
    notes = chain.apply(Volume(np.abs(noise((4, 5, 8))), np.eye(4))).warnings  # RAS: S is the last axis
    assert len(notes) == 2
    assert "Hounsfield" in notes[0]
    assert notes[1] == "2 mm instead of 1 along S, to fit the whole scan into the grid"


# ---- the object itself


CHAINS = [
    Preprocess(grid=(32, 256, 256)),
    Preprocess(grid=(64, 128, 128), orientation=None, intensity=Percentile(1, 99), crop=Foreground(margin_mm=5.0)),
    Preprocess(grid=(64, 96, 96), orientation="RAS", intensity=CT, crop=Foreground(-500), spacing=(3, 2.5, 2.5)),
]


@pytest.mark.parametrize("chain", CHAINS)
def test_json_round_trip(chain: Preprocess):
    assert Preprocess.from_dict(json.loads(json.dumps(chain.to_dict()))) == chain
    assert hash(chain) == hash(Preprocess.from_dict(chain.to_dict()))


def test_the_default_is_written_in_full():
    assert Preprocess(grid=(32, 256, 256)).to_dict() == {
        "grid": [32, 256, 256],
        "orientation": "SPL",
        "intensity": {"kind": "minmax"},
        "crop": None,
        "spacing": None,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": [4, 4, 4], "spacng": [1, 1, 1]}, "unknown key 'spacng' in preprocess; did you mean 'spacing'"),
        ({"grid": [4, 4, 4], "intensity": {"kind": "windw", "lo": 0, "hi": 1}}, "did you mean 'window'"),
        ({"grid": [4, 4, 4], "intensity": {"kind": "window", "lo": 0}}, "intensity needs the key 'hi'"),
        ({"grid": [4, 4, 4], "intensity": {"kind": "minmax", "lo": 0}}, "unknown key 'lo' in intensity; known: none"),
        ({"grid": [4, 4, 4], "crop": {"margin": 3}}, "did you mean 'margin_mm'"),
        ({"orientation": "RAS"}, "preprocess needs the key 'grid'"),
        ({"grid": [4, 4]}, "three positive whole numbers"),
        ({"grid": [4, 4, 0]}, "three positive whole numbers"),
        ({"grid": [4, 4, 4], "orientation": "SPP"}, "each patient axis once"),
        ({"grid": [4, 4, 4], "spacing": [1, 1, -1]}, "three positive numbers"),
        ({"grid": [4, 4, 4], "intensity": {"kind": "window", "lo": 3, "hi": 3}}, "lo < hi"),
        ({"grid": [4, 4, 4], "intensity": {"kind": "percentile", "lo": 50, "hi": 101}}, "<= 100"),
        ({"grid": [4, 4, 4], "crop": {"margin_mm": -1}}, "zero or more"),
    ],
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocess.from_dict(fields)


def test_wrong_shapes_are_refused():
    prepared = Preprocess(grid=(4, 4, 4)).apply(Volume(noise(), np.eye(4)))
    with pytest.raises(ValueError, match="on the grid of shape"):
        prepared.to_scan(np.zeros((5, 4, 4)))
    with pytest.raises(ValueError, match="the scan"):
        prepared.mask_to_grid(np.zeros((4, 4, 4)))
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        prepared.points_to_grid([1, 2, 3])
    with pytest.raises(ValueError, match="voxel box"):
        prepared.box_to_grid(Box((0, 0, 0), (1, 1, 1), "norm"))
    with pytest.raises(ValueError, match="order must be"):
        prepared.to_scan(np.zeros((4, 4, 4)), order=3)


def test_prepared_goes_through_worker_processes():
    prepared = Preprocess(grid=(4, 4, 4)).apply(Volume(noise(), np.eye(4)))
    copy = pickle.loads(pickle.dumps(prepared))
    assert np.array_equal(copy.to_scan(copy.array), prepared.to_scan(prepared.array))


def test_the_scan_is_left_as_it_was():
    array = noise()
    before = array.copy()
    volume = Volume(array, np.eye(4))
    prepared = Preprocess(grid=array.shape, orientation=None).apply(volume)
    prepared.array[...] = 7
    assert np.array_equal(volume.array, before)


def test_a_view_of_a_flip_has_the_matrix_of_a_flip():
    view = View((4, 5, 6), (2, 0, 1), (slice(None, None, -1), slice(1, 3), slice(None)))
    array = np.arange(120).reshape(4, 5, 6)
    index = view.matrix @ [2, 1, 3, 1]
    assert view.apply(array)[2, 1, 3] == array[tuple(index[:3].astype(int))]
