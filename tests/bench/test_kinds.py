"""Kinds of prompts: what can be said together, under one name each, and who is told what is wrong."""

import json

import pytest

from m3d.bench.config import BenchConfig
from m3d.bench.kinds import by_of, check_kinds, named, task_of
from m3d.config import load_config


def test_every_kind_and_what_goes_together():
    check_kinds(["text", "point", "points", "box", "slice_box", "scribble", "mask", "clicks"])
    check_kinds(["text+point", "text+mask+box+clicks", "mask+slice_box", "text+slice_box"])


@pytest.mark.parametrize(
    ("kinds", "fault"),
    [
        ([], "prompts is empty"),
        (["ponit"], r"unknown kind of prompt 'ponit'; did you mean 'point'\?"),
        (["text+boxes"], r"unknown kind of prompt 'boxes'; did you mean 'box'\?"),
        (["nothing"], "unknown kind of prompt 'nothing'; "),
        (["text+"], "unknown kind of prompt ''"),
        (["point", "point"], "has 'point' twice"),
        (["point+text"], r"'point\+text' is written 'text\+point'"),
        (["box+slice_box"], "has box and slice_box, of which one is taken"),
        (["point+clicks"], "has point and clicks, of which one is taken"),
        (["text+text"], "has text and text"),
        (["slice_box+clicks"], "points at what lies outside its box of one slice; take box"),
    ],
)
def test_nonsense_is_refused(kinds, fault):
    with pytest.raises(ValueError, match=fault):
        check_kinds(kinds)


def test_only_masks_are_asked_for_by_other_than_text(tmp_path):
    path = tmp_path / "bench.yaml"
    path.write_text(json.dumps({"tasks": {"seg.ref": {"prompts": ["text", "point"]}, "reg": {}}}))
    assert load_config(BenchConfig, path).tasks["seg.ref"].prompts == ("text", "point")
    assert load_config(BenchConfig, path).tasks["reg"].prompts == ("text",)
    with pytest.raises(ValueError, match=r"tasks\.reg\.prompts: only masks are asked for by other than text"):
        load_config(BenchConfig, path, ["tasks.reg.prompts=[box]"])
    with pytest.raises(ValueError, match=r"prompts.*unknown kind of prompt 'clik'; did you mean 'clicks'"):
        load_config(BenchConfig, path, ["tasks.seg.ref.prompts=[clik]"])


def test_a_row_and_a_question_keep_their_name_where_they_are_asked_by_text():
    assert named("seg.sem", "text") == "seg.sem" and named("seg.sem", "text+box") == "seg.sem by text+box"
    assert [task_of(name) for name in ("seg.sem", "seg.sem by text+box")] == ["seg.sem", "seg.sem"]
    assert [by_of(name) for name in ("seg.sem", "seg.sem by text+box")] == ["text", "text+box"]
