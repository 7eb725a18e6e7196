"""Fine-tuning on a folder in nnU-Net's layout: what is held out, how it is measured, and both kinds of checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import m3d
from data_prep.sources.base import Entry
from data_prep.sources.registry import build_source
from data_prep.store import Store
from m3d.cli.main import main
from m3d.config import find_config, load_config
from m3d.models.name_reader import PairNames
from m3d.recipes import finetune, instruct, pretrain_segvol
from m3d.recipes.handover import save_model
from m3d.recipes.held_out import Drawn, deepest, hard_dice, summary
from m3d.recipes.own_folder import checkpoint_folder, entries_of, hold_out, prepare_folder
from m3d.recipes.pretrain_segvol import save_segvol
from tests.fixtures.nnunet_folder import write_nnunet
from tests.fixtures.small_head import PREPROCESS, segvol, small_pair

SHIPPED = find_config(Path("configs/segvol/finetune.yaml"))


def entry(patient: str, number: int = 0) -> Entry:
    return Entry(
        dataset="mine", image_id=f"{patient}_{number}", patient_id=patient, split="train", files=(), read=lambda: None
    )  # type: ignore[arg-type, return-value]


def test_whole_patients_are_held_out_and_the_same_ones_every_time():
    entries = [entry(f"p{number}", scan) for number in range(10) for scan in range(2)]
    found = hold_out(entries, 0.25)
    held = {one.patient_id for one in found if one.split == "validation"}
    assert held == {"p0", "p2", "p7", "p9"}  # SHA-256 begins 0.088, 0.224, 0.016, 0.149; of all others above 0.25
    assert {one.patient_id for one in found if one.split == "train"}.isdisjoint(held)
    assert {one.patient_id for one in hold_out(entries[::-1], 0.25) if one.split == "validation"} == held
    grown = hold_out([*entries, *(entry(f"p{number}") for number in range(10, 20))], 0.25)
    assert {one.patient_id for one in grown if one.split == "validation"} == held | {"p11", "p17"}  # nobody moved
    few = hold_out(entries[:6], 0.1)
    assert len({one.patient_id for one in few if one.split == "validation"}) == 2  # two at least
    with pytest.raises(ValueError, match="2 patients, of whom 2 are held out, leave nobody to learn from; 3 are"):
        hold_out(entries[:4], 0.1)


def test_dice_and_the_click_by_hand():
    truth, guess = np.zeros((4, 5, 6), bool), np.zeros((4, 5, 6), bool)
    assert hard_dice(guess, truth) == 1.0
    truth[:2], guess[1:3] = True, True
    assert hard_dice(guess, truth) == 0.5
    ball = np.zeros((9, 9, 9), bool)
    ball[2:7, 1:8, 3:6] = True
    assert deepest(ball, (1, 1, 1))[2] == 4.0  # the thinnest side decides
    edge = np.zeros((5, 5, 5), bool)
    edge[:3] = True  # what lies at the border ends there
    assert deepest(edge, (1, 1, 1))[0] == 1.0


def test_means_are_those_of_cases_and_then_of_structures():
    rows = [
        Drawn(case, "liver", by, dice) for case, dice in (("a", 0.2), ("b", 0.6)) for by in ("name", "click", "box")
    ]
    rows += [Drawn("a", "spleen", "name", 0.0, refused=True), Drawn("a", "spleen", "click", 1.0)]
    rows += [Drawn("a", "spleen", "box", 0.5)]
    found = summary(rows)
    assert found["structures"]["liver"] == pytest.approx({"n": 2, "name": 0.4, "click": 0.4, "box": 0.4})
    assert found["structures"]["spleen"] == {"n": 1, "name": 0.0, "click": 1.0, "box": 0.5}
    assert found["mean"] == pytest.approx({"name": 0.2, "click": 0.7, "box": 0.45})
    assert found["rows"][-3]["refused"] is True
    said = finetune.table({"before": found, "after": found})
    assert "spleen: 0.00 -> 0.00, 1.00 -> 1.00, 0.50 -> 0.50 (n=1)" in said


def test_nothing_measured_is_said_in_a_sentence():
    assert "nothing was measured" in finetune.table({"before": summary([]), "after": summary([])})


def test_before_is_measured_again_for_other_scans_or_another_checkpoint(tmp_path, monkeypatch):
    measured: list[list[str]] = []

    def measure(_: object, entries: list[Entry]) -> list[Drawn]:
        measured.append([one.image_id for one in entries])
        return [Drawn(one.image_id, "liver", by, 0.5) for one in entries for by in ("name", "click", "box")]

    monkeypatch.setattr("m3d.inference.load.load", lambda *_, **__: None)
    monkeypatch.setattr("m3d.recipes.held_out.measure", measure)
    monkeypatch.setattr(finetune, "fingerprint", str)
    (tmp_path / "run").mkdir()
    config = finetune.Config(folder="mine", output=str(tmp_path / "run"))
    for folder, patients in (("a", "pq"), ("a", "pq"), ("b", "pq"), ("b", "p")):
        finetune._measure(config, "before", Path(folder), [entry(patient) for patient in patients])
    assert measured == [["p_0", "q_0"], ["p_0", "q_0"], ["p_0"]]
    with pytest.raises(ValueError, match="none of the 0 scans held out has a contour to measure on; raise held_out="):
        finetune._measure(config, "before", Path("b"), [])


def test_the_patients_held_out_choose_nothing_and_a_store_without_them_is_not_judged(tmp_path):
    config = load_config(finetune.Config, SHIPPED, [f"folder={tmp_path}"])
    assert config.best is None and config.learning().best is None
    assert config.learning().data.judged == "validation"
    source = build_source({"kind": "nnunet", "root": str(write_nnunet(tmp_path / "mine", cases=3))})
    entries = hold_out(list(source.entries()), 0.1)
    full, bare = str(tmp_path / "full"), str(tmp_path / "bare")
    prepare_folder(entries, PREPROCESS, Path(full))
    prepare_folder([one for one in entries if one.split == "train"], PREPROCESS, Path(bare))
    assert replace(config, stores=(full,)).learning().data.judged == "validation"
    assert replace(config, stores=(full, bare)).learning().data.judged is None
    with pytest.raises(ValueError, match="best=loss, but a store has no validation split"):
        replace(config, stores=(bare,), best="loss").learning()


def test_what_is_wrong_is_told_before_anything_is_loaded(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"no dataset\.json in it; nnU-Net's layout has"):
        entries_of(str(tmp_path), {}, 0.2)
    folder = write_nnunet(tmp_path / "mine", cases=2)
    with pytest.raises(ValueError, match="did you mean 'channel'"):
        entries_of(str(folder), {"chanel": 0}, 0.2)
    with pytest.raises(ValueError, match="leave nobody to learn from"):
        entries_of(str(folder), {}, 0.2)
    config = load_config(finetune.Config, SHIPPED, [f"folder={folder}"])
    with pytest.raises(ValueError, match=r"held_out=1\.0 must be between 0 and 1"):
        replace(config, held_out=1.0)
    with pytest.raises(ValueError, match="shares has 1 numbers for 0 stores"):
        replace(config, shares=(1.0,))
    assert main(["train", str(SHIPPED), f"folder={tmp_path}", "--out", str(tmp_path / "run"), "--device", "cpu"]) == 1
    assert "no dataset.json" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        checkpoint_folder(str(tmp_path / "nothing"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "m3d_clip"}')
    with pytest.raises(ValueError, match="holds a 'm3d_clip' model; a whole model or a head is needed"):
        replace(config, checkpoint=str(tmp_path / "other")).learning()


def test_the_dry_run_plans_it_for_the_checkpoints_grid(tmp_path, capsys):
    folder = write_nnunet(tmp_path / "mine", cases=3)
    assert main(["train", str(SHIPPED), f"folder={folder}", "--out", str(tmp_path / "run"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stage"] == "finetune" and plan["steps"] == 300
    assert any("not prepared yet" in note for note in plan["notes"])
    assert not (tmp_path / "run").exists()


def config_of(tmp_path: Path, checkpoint: Path, **more: object) -> finetune.Config:
    values = yaml.safe_load(SHIPPED.read_text()) | {
        "folder": str(write_nnunet(tmp_path / "mine", cases=4)), "output": str(tmp_path / "run"),
        "checkpoint": str(checkpoint), "most_measured": 2, "exchanges": 2, "engine": {"device": "cpu"}, "augment": None,
        "optim": {"steps": 12, "lr": 5e-3, "batch": 1, "micro_batch": 1, "save_every": 6, "warmup": 0}, "best": None,
    } | more  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    return load_config(finetune.Config, tmp_path / "mine.yaml")


def losses(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]


def check_folder(config: finetune.Config, structures: set[str]) -> None:
    """What a run leaves: a store with patients held out, Dice before and after, a loss that has fallen."""
    output, store = Path(config.output), Store(config.store)
    assert sorted(image.split for image in store.images.values()) == ["train", "train", "validation", "validation"]
    found = json.loads((output / "held_out.json").read_text())
    held = {image.image_id.split("/")[1] for image in store.images.values() if image.split == "validation"}
    for when in ("before", "after"):
        assert set(found[when]["structures"]) == structures
        assert {row["case"] for row in found[when]["rows"]} == held
        assert all(0 <= row["dice"] <= 1 for row in found[when]["rows"])
    rows = losses(output)
    assert len(rows) == 12
    assert np.mean([row["loss"] for row in rows[-4:]]) < np.mean([row["loss"] for row in rows[:4]])


@pytest.mark.integration
def test_a_whole_model_learns_a_folder_and_is_loaded_again(model, processor, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_model(checkpoint, model, processor)
    config = config_of(tmp_path, checkpoint)
    assert isinstance(config.learning(), instruct.Config)
    manifest = finetune.main(config)
    assert manifest["final"] and manifest["steps"] == 12
    check_folder(config, {"lower jaw", "brainstem"})
    loaded = m3d.load(config.output, device="cpu")
    scan = loaded.look(next(iter((tmp_path / "mine" / "imagesTr").iterdir())))
    assert set(scan.vocabulary) == {"lower jaw", "brainstem"}
    assert scan.segment(points=[((24, 24, 20), 1)]).masks[0].array.shape == scan.volume.shape


@pytest.mark.integration
def test_a_head_learns_a_folder_with_its_text_tower(tmp_path):
    checkpoint = tmp_path / "head"
    checkpoint.mkdir()
    save_segvol(checkpoint, segvol(text_source="clip"), PREPROCESS, PairNames.of(small_pair()))
    config = config_of(tmp_path, checkpoint)
    assert isinstance(config.learning(), pretrain_segvol.Config)
    finetune.main(config)
    check_folder(config, {"lower jaw", "brainstem"})
    scan = m3d.load(config.output, device="cpu").look(next(iter((tmp_path / "mine" / "imagesTr").iterdir())))
    assert scan.segment("brainstem").masks[0].array.shape == scan.volume.shape
    assert scan.vocabulary == ("mandible", "brainstem", "lower jaw")  # what it knew keeps its place
