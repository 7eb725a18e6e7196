"""What a trained chain left, read back: means by hand, and a table of them."""

import json

import pytest
import training_record
import write_tables


def test_a_curve_has_the_mean_of_each_twentieth():
    rows = [{"step": step, "loss": float(step), "lr": 0.1, "lr/text": 0.1, "tokens/s": 9.0} for step in range(1, 41)]
    rows[3] |= {"dice": 0.5}
    points = training_record.curve(rows)
    assert len(points) == 20
    assert points[0] == {"step": 2, "loss": 1.5}
    assert points[1] == {"step": 4, "loss": 3.5, "dice": 0.5}
    assert [point["step"] for point in training_record.curve(rows[:3])] == [1, 2, 3]


def test_a_stage_that_is_not_done_is_named(tmp_path):
    link = type("Link", (), {"output": str(tmp_path / "align")})()
    with pytest.raises(FileNotFoundError, match=r"align: this stage is not done; run the chain first"):
        training_record.stage_of("align", link)


def test_a_stage_whose_output_is_gone_keeps_its_row_and_one_that_is_there_does_not(tmp_path):
    links = [("align", type("Link", (), {"output": str(tmp_path / name)})()) for name in ("first", "second")]
    earlier = [{"name": "first", "steps": 3}, {"name": "second", "steps": 4}]
    assert training_record.stages_of(links, earlier) == earlier
    with pytest.raises(FileNotFoundError, match="first: this stage is not done"):
        training_record.stages_of(links, earlier[1:])
    (tmp_path / "second").mkdir()
    with pytest.raises(FileNotFoundError, match="second: this stage is not done"):
        training_record.stages_of(links, earlier)


def test_the_table_has_minutes_and_losses_before_and_after(tmp_path, monkeypatch):
    monkeypatch.setattr(write_tables, "RESULTS", tmp_path)
    judged = [{"step": 5, "loss": 2.0, "text": 1.25}, {"step": 10, "loss": 1.0, "text": 0.5}]
    stage = {"name": "align", "stage": "align", "steps": 10, "batch": 4, "wall_seconds": 150.0, "evaluations": judged}
    words = stage | {"name": "words", "evaluations": [{"step": 10, "loss": 3.0}]}
    result = {"command": "m3d train x", "machine": {"cores": 2, "gpu": None}, "stages": [words, stage]}
    (tmp_path / "training_m3d-tiny.json").write_text(json.dumps(result | {"model": "m3d-tiny"}))
    assert write_tables.stages().endswith(
        "`m3d-tiny`: `m3d train x` on 2 CPU cores; minutes include what else the machine did."
    )
    second = result | {"model": "m3d-smol", "stages": [stage | {"name": "instruct"}]}
    (tmp_path / "training_m3d-smol.json").write_text(json.dumps(second))
    text = write_tables.stages()
    assert "| instruct | 10 | 4 | 2 | text 1.250 to 0.500 (steps 5 to 10) |" in text.partition("`m3d-tiny`")[2]
    assert "| words | 10 | 4 | 2 | loss 3.000 to 3.000 |" in text
    assert "| align | 10 | 4 | 2 | text 1.250 to 0.500 (steps 5 to 10) |" in text
    assert "on 2 CPU cores" in text
