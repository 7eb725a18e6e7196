"""What is watched: lines that stand once, rates that add up, and looks that leave no trace."""

import json
import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from m3d.train import watch
from m3d.train.watch import LossLog, Progress, Samples, Scalars, Speed, aside, truncate


def state(step: int, last: int = 10) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=last)


def test_lines_after_the_step_that_is_gone_back_to_come_again(tmp_path):
    path = tmp_path / "losses.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, 6)) + '{"step": 6, "l')
    log = LossLog(tmp_path)
    log.on_train_begin(None, state(3), None)
    log.on_log(None, state(4), None, logs={"loss": 2.0})
    log.on_log(None, state(4), None, logs={"eval_dice": 0.5})
    log.on_log(None, state(4), None, logs={"train_runtime": 9.0})
    log.on_train_end(None, state(4), None)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *({"step": n, "loss": 1.0} for n in (1, 2, 3)),
        {"step": 4, "loss": 2.0},
    ]
    assert (tmp_path / "evaluations.jsonl").read_text() == '{"step": 4, "eval_dice": 0.5}\n'


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "losses.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"losses.jsonl:2 is no JSON"):
        truncate(tmp_path / "losses.jsonl", 3)


def test_speed_divides_what_was_counted_by_the_time_of_the_step(monkeypatch):
    clock = iter([0.0, 2.0, 2.0, 7.0, 8.0, 8.0])
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    speed = Speed()
    row = speed.row(8, {"tokens": 100, "volumes": 4, "text": 60})
    assert (row["samples/s"], row["tokens/s"], row["volumes/s"], row["seconds"]) == (4.0, 50.0, 2.0, 2.0)
    assert "text/s" not in row and row["memory_gib"] > 0.01 and not any("lost" in name for name in row)
    speed.restart()  # five seconds of saving
    row = speed.row(8, {"cut": 2, "refused": 0})
    assert row["samples/s"] == 8.0 and row["lost/cut"] == 2 and "lost/refused" not in row


def test_a_look_leaves_no_trace():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model.train()
    model[0].eval()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    with aside(model):
        assert not model[1].training and not torch.is_grad_enabled()
        torch.rand(9), random.random(), np.random.rand(9)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert model[1].training and not model[0].training


def test_samples_come_every_so_many_steps_whole_or_not_at_all(tmp_path, caplog):
    asked = []

    def write(step, folder):
        asked.append(step)
        (folder / "overlay.png").write_text(str(step))
        if step == 4:
            raise OSError("no space left")

    samples = Samples(2, write, tmp_path / "samples", objective=nn.Linear(1, 1))
    with caplog.at_level(logging.WARNING):
        for step in range(1, 8):
            samples.on_step_end(None, state(step, last=7), None, model=nn.Linear(1, 1))
    assert asked == [2, 4, 6, 7]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step-000002",
        "step-000006",
        "step-000007",
    ]
    assert "no sample predictions at step 4: no space left" in caplog.text
    samples.on_step_end(None, state(2), None, model=nn.Linear(1, 1))  # a resumed run comes by again
    assert (tmp_path / "samples" / "step-000002" / "overlay.png").read_text() == "2"


def test_scalars_reach_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    scalars = Scalars(tmp_path)
    scalars.on_train_begin(None, state(0), None)
    scalars.on_log(None, state(1), None, logs={"loss": 2.5, "lr/seg_head": 0.1})
    scalars.on_log(None, state(1), None, logs={"eval_dice": 0.5, "none": None, "nan": float("nan")})
    scalars.on_train_end(None, state(1), None)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/dice", "train/loss", "train/lr/seg_head"]
    assert events.Scalars("train/loss")[0].value == 2.5


def test_without_tensorboard_there_is_a_notice(monkeypatch, caplog):
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert not Scalars.available()
    assert "pip install 'm3d-lamed[train]'" in caplog.text


def test_progress_without_a_terminal_is_a_line_with_what_is_left(monkeypatch, caplog):
    clock = iter([0.0, 30.0, 300.0])
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    progress = Progress(every=5)
    with caplog.at_level(logging.INFO, logger="m3d.train.watch"):
        progress.on_train_begin(None, state(2), None)
        for step in (3, 4, 5):
            progress.on_log(None, state(step), None, logs={"loss": 1.5, "text": 1.25, "grad_norm": 3.0, "lr": 1.0})
        progress.on_train_end(None, state(5), None)
    assert [record.message for record in caplog.records] == ["step 5/10, 00:50 left: loss 1.5 text 1.25"]
