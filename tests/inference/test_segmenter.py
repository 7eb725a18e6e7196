"""A head without a language model: saved with its text tower, loaded by `m3d.load`, prompted by names and geometry."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

import m3d
from data_prep.phantoms import head_neck
from m3d.cli.main import main
from m3d.inference.segmenter import Segmenter
from m3d.models.clip import Pair
from m3d.models.name_reader import PairNames, read_name_reader
from m3d.models.name_tower import NameTower
from m3d.recipes.pretrain_segvol import save_segvol
from segvol_head import Prompts
from tests.fixtures.small_head import GRID, PREPROCESS, WORDS, segvol, small_pair, tokenizer


@pytest.fixture
def pair() -> Pair:
    return small_pair()


@pytest.fixture
def folder(tmp_path, pair):
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    save_segvol(folder, segvol(text_source="clip"), PREPROCESS, PairNames.of(pair))
    return folder


@pytest.fixture(scope="module")
def volume():
    return head_neck(3, shape=(32, 32, 24), spacing=(16.0, 16.0, 10.0)).volume


def test_the_text_side_alone_reads_names_as_the_pair_does(pair, folder):
    read = read_name_reader(folder)
    names = ["mandible", "liver"]
    ids = pair.tokenizer(
        [f"A computerized tomography of a {name}." for name in names], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        expected = pair.model.embed_texts(ids["input_ids"], ids["attention_mask"]) * 12**0.5
    torch.testing.assert_close(read.vectors(names), expected)
    assert not torch.equal(read.vectors(names)[0], read.vectors(names)[1])
    assert not [path.name for path in (folder / "text_tower").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_name_is_drawn_through_the_text_tower(folder, pair, volume):
    model = m3d.load(folder, device="cpu")
    assert isinstance(model, Segmenter) and model.id == "run"
    assert m3d.load(folder.parent, device="cpu").id == "run"  # the stage's output means its model
    scan = model.look(volume)
    found = scan.segment("mandible")
    (mask,) = found.masks
    assert mask.name == "mandible" and mask.array.shape == volume.shape
    head = segvol(text_source="clip")
    with torch.no_grad():
        pixels = torch.from_numpy(np.ascontiguousarray(scan.prepared.array))[None, None]
        vectors = PairNames.of(pair).vectors(["mandible"])
        logits = head.draw(head.look(pixels), torch.zeros(1, dtype=torch.long), names=vectors)
    drawn, _ = scan.draw_one("mandible", text=scan.text_prompt("mandible"), geometry=None)
    np.testing.assert_allclose(drawn.logits, logits[0, 0].numpy(), atol=1e-5)
    assert [one.name for one in scan.segment(["mandible", "liver"]).masks] == ["mandible", "liver"]
    assert [one.name for one in scan.segment_all().masks] == ["mandible"]


def test_points_boxes_sessions_and_zoom_work_as_with_a_whole_model(folder, volume):
    scan = m3d.load(folder, device="cpu").look(volume)
    point = scan.segment(points=[((16, 16, 12), 1)])
    both = scan.segment("mandible", points=[((16, 16, 12), 1)], box=m3d.Box((8, 8, 4), (24, 24, 20)))
    assert point.masks[0].array.shape == both.masks[0].array.shape == volume.shape
    session = scan.session()
    step = session.object("jaw").add_name("mandible")
    assert np.array_equal(step.mask.array, scan.segment("mandible").masks[0].array)
    assert scan.segment("mandible", zoom=1.5).masks[0].array.shape == volume.shape
    assert scan.blinded().segment("mandible").masks[0].array.shape == volume.shape


def test_what_it_cannot_do_is_said(folder, tmp_path, volume):
    scan = m3d.load(folder, device="cpu").look(volume)
    for ask in (lambda: scan.ask("What?"), scan.report, lambda: scan.locate("liver"), lambda: scan.ask_many(["a"])):
        with pytest.raises(ValueError, match="run has no language model: it draws by names, points and boxes"):
            ask()
    bare = tmp_path / "bare"
    bare.mkdir()
    save_segvol(bare, segvol(), PREPROCESS)
    silent = m3d.load(bare, device="cpu").look(volume)
    with pytest.raises(m3d.NoMask, match="learned names from a language model"):
        silent.segment("mandible")
    assert silent.segment(["mandible"]).not_drawn[0].name == "mandible"
    assert silent.segment(points=[((16, 16, 12), 1)]).masks
    with pytest.raises(ValueError, match="no language model, which alone is quantised"):
        m3d.load(folder, device="cpu", quantize="4bit")


def test_a_released_segvols_text_tower_is_read_too(tmp_path, volume):
    """CLIP's own text model and one linear layer, as a converted SegVol has them."""
    torch.manual_seed(2)
    text = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=8, max_position_embeddings=16, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    tower = NameTower(CLIPTextModel(text).eval(), tokenizer())
    head = segvol(8, text_source="clip", text_projector="linear")
    save_segvol(tmp_path, head, PREPROCESS, tower)
    scan = m3d.load(tmp_path, device="cpu").look(volume)
    with torch.no_grad():
        expected = head.seg_projector(tower.vectors(["liver"]))
    torch.testing.assert_close(scan.text_prompt("liver"), expected)
    assert not torch.equal(scan.text_prompt("mandible"), expected)
    logits = scan.model.draw_on(torch.zeros(1, 1, *GRID), Prompts(text=expected))
    assert logits.shape == (1, 1, *GRID)


def test_the_command_segments_and_refuses_to_talk(folder, tmp_path, volume, capsys):
    path = tmp_path / "ct.nii.gz"
    import nibabel as nib

    nib.save(nib.Nifti1Image(volume.array, volume.affine), path)
    out = tmp_path / "out"
    assert (
        main(["segment", str(path), "mandible", "--model", str(folder.parent), "--out", str(out), "--device", "cpu"])
        == 0
    )
    assert (out / "mandible.nii.gz").is_file()
    assert main(["ask", str(path), "What is it?", "--model", str(folder.parent), "--device", "cpu"]) == 1
    assert "no language model" in capsys.readouterr().err


def test_a_head_goes_on_learning_with_its_own_text_tower(folder):
    from m3d.recipes.pretrain_segvol import Config, MasksConfig, Names, build, reader_of

    config = Config(data=MasksConfig(stores=("store",)), checkpoint=str(folder))
    reader = reader_of(config)
    model = build(config, PREPROCESS, reader.vectors(["liver"]).shape[-1])
    assert all(
        torch.equal(one, segvol(text_source="clip").state_dict()[name]) for name, one in model.state_dict().items()
    )
    with pytest.raises(ValueError, match="12 wide, those of names are 20"):
        build(config, PREPROCESS, 20)
    with pytest.raises(ValueError, match="prepared otherwise"):
        build(config, replace(PREPROCESS, grid=(8, 16, 24)), 12)
    with pytest.raises(ValueError, match="checkpoint brings all parts; leave out vision_tower"):
        replace(config, vision_tower="x")
    with pytest.raises(ValueError, match="needs one reader"):
        Config(data=MasksConfig(stores=("store",)))
    assert replace(config, names=Names(clip="y")).parents()["clip"] == "y"
