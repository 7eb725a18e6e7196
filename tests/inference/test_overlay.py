"""Pictures as a radiologist expects them, from any stored orientation: the pixels first, then what is drawn."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from nibabel import orientations

from data_prep.boxes import box_of_mask
from data_prep.volume import Volume, spl_affine
from m3d.inference import overlay
from m3d.inference.overlay import Row, draw_rows, save_overlay, save_png
from m3d.inference.planes import Finding, Window, choose_window, is_oblique, mid_planes

SHAPE, SPACING = (20, 24, 30), (3.0, 2.0, 1.0)  # S, P, L
CODES = ["".join(c) for axes in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*axes)]


def upright() -> tuple[Volume, np.ndarray]:
    """A body in air, and in it a blob on the patient's left, in front, near the feet, longer than wide."""
    array = np.full(SHAPE, -1000.0, np.float32)
    array[:, 2:22, 2:28] = np.random.default_rng(0).normal(40, 10, (20, 20, 26))
    blob = np.zeros(SHAPE, bool)
    blob[3:8, 4:8, 19:26] = True
    array[blob] = 200.0
    return Volume(array, spl_affine(SPACING)), blob


def stored(codes: str) -> tuple[Volume, np.ndarray]:
    """The same patient in a file whose axes are ``codes``."""
    volume, blob = upright()
    moves = orientations.ornt_transform(
        orientations.axcodes2ornt(tuple("SPL")), orientations.axcodes2ornt(tuple(codes))
    )
    affine = volume.affine @ orientations.inv_ornt_aff(moves, volume.shape)
    turned = Volume(orientations.apply_orientation(volume.array, moves), affine)
    assert turned.orientation == codes
    return turned, orientations.apply_orientation(blob, moves)


@pytest.mark.parametrize("codes", CODES)
def test_every_stored_orientation_gives_the_same_radiological_picture(codes):
    volume, blob = stored(codes)
    axial, coronal, sagittal = mid_planes(volume, [Finding("blob", blob, box_of_mask(blob))])

    for plane in (axial, coronal):  # patient left is on the right of the picture
        columns = np.flatnonzero(plane.masks[0].any(axis=0))
        assert columns.min() > plane.image.shape[1] / 2
        assert plane.letters[:2] == "RL"
    rows = np.flatnonzero(axial.masks[0].any(axis=1))
    assert rows.max() < axial.image.shape[0] / 2, "anterior is up"
    for plane in (coronal, sagittal):
        rows = np.flatnonzero(plane.masks[0].any(axis=1))
        assert rows.min() > plane.image.shape[0] / 2, "the feet are down"
    columns = np.flatnonzero(sagittal.masks[0].any(axis=0))
    assert columns.max() < sagittal.image.shape[1] / 2, "anterior is on the left of a sagittal picture"
    assert (axial.letters[2:], coronal.letters[2:], sagittal.letters) == ("AP", "SI", "APSI")
    assert (axial.spacing, coronal.spacing, sagittal.spacing) == ((2.0, 1.0), (3.0, 1.0), (3.0, 2.0))

    expected = mid_planes(upright()[0], [Finding("blob", upright()[1])])
    for plane, reference in zip((axial, coronal, sagittal), expected, strict=True):
        np.testing.assert_array_equal(plane.image, reference.image)
        np.testing.assert_array_equal(plane.masks[0], reference.masks[0])
        assert (plane.image[plane.masks[0]] == 200).all(), "mask and scan are turned alike"


@pytest.mark.parametrize("codes", ["SPL", "RAS", "PLI", "AIR"])
def test_a_box_frames_its_mask_to_the_voxel(codes):
    volume, blob = stored(codes)
    for plane in mid_planes(volume, [Finding("blob", blob, box_of_mask(blob))]):
        rows, columns = (np.flatnonzero(plane.masks[0].any(axis=axis)) for axis in (1, 0))
        left, top, width, height = plane.boxes[0]
        expected = np.array([columns[0], rows[0], len(columns), len(rows)])
        np.testing.assert_allclose([left, top, width, height], expected * np.tile(plane.spacing[::-1], 2))


@pytest.mark.parametrize("codes", ["SPL", "RAS", "PLI", "IAR"])
def test_a_plane_says_how_the_stored_array_spells_it(codes):
    volume, blob = stored(codes)
    for plane in mid_planes(volume, [Finding("blob", blob)]):
        index = tuple(slice(None) if part == ":" else int(part) for part in plane.where.strip("[]").split(", "))
        assert np.count_nonzero(blob[index]) == np.count_nonzero(plane.masks[0])


def test_the_planes_go_through_the_middle_of_the_finding_asked_for():
    volume, blob = upright()
    other = np.zeros(SHAPE, bool)
    other[15, 18, 5] = True
    findings = [Finding("blob", blob), Finding("dot", other)]
    assert [plane.where for plane in mid_planes(volume, findings)] == ["[5, :, :]", "[:, 5, :]", "[:, :, 22]"]
    assert [plane.where for plane in mid_planes(volume, findings, centre_on=1)] == [
        "[15, :, :]",
        "[:, 18, :]",
        "[:, :, 5]",
    ]


def test_a_hollow_structure_is_cut_where_it_is_and_not_in_its_empty_middle():
    horseshoe = np.zeros(SHAPE, bool)
    horseshoe[8:10, 6:16, 4:8] = horseshoe[8:10, 6:16, 24:28] = True  # centre of mass between the two
    planes = mid_planes(upright()[0], [Finding("horseshoe", horseshoe)])
    assert all(plane.masks[0].any() for plane in planes)


def test_a_box_elsewhere_is_not_drawn_and_an_empty_mask_does_no_harm():
    volume, blob = upright()
    far = np.zeros(SHAPE, bool)
    far[18:20, 20:22, 2:4] = True
    planes = mid_planes(volume, [Finding("a", blob), Finding("b", None, box_of_mask(far)), Finding("c", far & False)])
    assert [plane.boxes[1] for plane in planes] == [None, None, None]
    assert not any(plane.masks[2].any() for plane in planes)


def test_planes_are_trimmed_to_the_body_near_the_finding():
    array = np.full((40, 200, 300), -1000.0, np.float32)
    array[:, 60:140, 100:200] = 30.0
    mask = np.zeros(array.shape, bool)
    mask[18:22, 95:105, 140:160] = True
    axial, *_ = mid_planes(Volume(array, spl_affine((2.0, 1.0, 1.0))), [Finding("m", mask)])
    assert axial.image.shape == (80 + 2 * 8, 100 + 2 * 8)


def test_ct_gets_a_soft_tissue_window_and_the_rest_its_own_range():
    assert str(choose_window(upright()[0])) == "window 400, level 40 HU"
    values = np.random.default_rng(0).permutation(np.linspace(0, 1000, 27000, dtype=np.float32))
    mr = Volume(values.reshape(30, 30, 30), np.eye(4))
    window = choose_window(mr)
    assert 0 < window.lo < 20 and 980 < window.hi < 1000
    assert "intensities" in str(window)


def test_oblique_is_told_from_straight():
    volume, _ = upright()
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    assert not is_oblique(volume)
    assert is_oblique(Volume(volume.array, turn @ volume.affine))


def test_millimetres_have_one_length_in_every_panel():
    volume, blob = upright()
    planes = mid_planes(volume, [Finding("blob", blob)])
    figure = draw_rows([Row(planes, choose_window(volume))], [Finding("blob", blob)], title="t")
    inches = figure.get_size_inches()
    scales = []
    for axes, plane in zip(figure.axes, planes, strict=True):
        place = axes.get_position()
        scales += [place.width * inches[0] / plane.size_mm[1], place.height * inches[1] / plane.size_mm[0]]
    np.testing.assert_allclose(scales, scales[0])


def test_the_picture_says_all_that_must_be_said(tmp_path):
    volume, blob = upright()
    written = []
    findings = [Finding(f"part {i}", blob, box_of_mask(blob), note="1.5 mL") for i in range(8)]
    original = overlay.draw_rows

    def spy(*args, **kwargs):
        figure = original(*args, **kwargs)
        written.extend(text.get_text() for text in [*figure.texts, *(t for axes in figure.axes for t in axes.texts)])
        return figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlay, "draw_rows", spy)
        save_overlay(tmp_path / "o.png", volume, findings, title="part 0", notes=["Drawn by a test."])
    said = "\n".join(written)
    for words in ("part 0", "1.5 mL", "window 400, level 40 HU", "Not for clinical use", "Drawn by a test.", "axial"):
        assert words in said
    assert {"L", "R", "A", "P", "S", "I"} <= set(written)
    assert any(text.endswith((" mm", " cm")) for text in written), "a scale bar"


def test_the_png_is_large_colourful_and_names_no_file(tmp_path):
    volume, blob = upright()
    path = tmp_path / "secret_patient.png"
    save_overlay(path, volume, [Finding("blob", blob, box_of_mask(blob), "1 mL")], title="blob")
    picture = imread(path)
    assert picture.shape[1] >= 1000
    blue = (picture[..., 2] - picture[..., 0] > 0.3).sum()
    assert blue > 500, "the first colour-blind-safe colour is there"
    assert b"secret" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()


def test_flat_scans_stack_their_flat_planes():
    volume = Volume(np.random.default_rng(0).normal(0, 300, (4, 60, 60)).astype(np.float32), spl_affine((2.0, 1, 1)))
    row = Row(mid_planes(volume, centre=(2, 30, 30)), Window(-1, 1))
    assert [len(column) for column in row.columns] == [1, 2]
    assert draw_rows([row], [], title="flat").axes


def test_drawing_touches_nothing_global(tmp_path):
    code = f"""
import sys
from pathlib import Path
import numpy as np
from data_prep.volume import Volume, spl_affine
from m3d.inference.overlay import save_overlay
from m3d.inference.planes import Finding
volume = Volume(np.random.default_rng(0).normal(size=(6, 7, 8)), spl_affine((1, 1, 1)))
save_overlay(Path({str(tmp_path / "o.png")!r}), volume, [Finding("a", volume.array > 1)], title="a")
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_saving_keeps_the_notice_in_the_file(tmp_path):
    volume, blob = upright()
    save_png(draw_rows([Row(mid_planes(volume), Window(0, 1))], [], title="t"), tmp_path / "p.png")
    assert b"Not for clinical use" in (tmp_path / "p.png").read_bytes()
    assert not blob.all()
