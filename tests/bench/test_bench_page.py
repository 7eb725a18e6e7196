"""The page: which samples it shows, that it needs and runs nothing, and that it is there whole or not at all."""

import json
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data_prep.boxes import Box
from data_prep.volume import Volume
from m3d.bench.metrics.base import mean
from m3d.bench.page import choose, write_page
from m3d.inference.planes import Finding


@dataclass(frozen=True)
class Share:
    name: str = "share"
    variant: str = "mean"
    better: str = "higher"
    unit: str = ""
    worst: tuple[float, ...] | None = (0.0,)

    def statistics(self, samples):
        raise AssertionError("the page never looks at a sample again")

    def reduce(self, sums, counts):
        return mean(sums, counts)


def known(task, protocol):
    return (Share(),)


def sample(record, value, **more):
    return {
        "id": record, "sight": "seeing", "task": "report", "subtask": None, "image_id": "i", "patient_id": "SECRET-7",
        "group": "", "failure": None, "text": f"said {record}", "reference": f"true {record}",
        "statistics": {"share": None if value is None else [value]}, **more,
    }  # fmt: skip


def write(folder, samples, metrics=("share",)):
    entry = {"variant": "mean", "better": "higher", "unit": "", "value": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    tasks = {}
    for one in samples:
        found = {"n": 3, "patients": 2, "n_failed": 1, "failures": {"NoMask": 1}}
        tasks[one["task"]] = {**found, "metrics": dict.fromkeys(metrics, entry)}
    run = {
        "schema": "m3d.bench/1", "protocol": "standard", "grid": "scan", "model": {"id": "m3d-tiny"},
        "data": {"name": "OpenKBP", "split": "validation"}, "tasks": tasks,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(run))
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    asked = [{"id": one["id"], "sight": one["sight"], "prompt": f"what of {one['id']}?"} for one in samples]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    return folder


class Seen(HTMLParser):
    """Tags with their attributes, and the text that a person reads."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def seen(path):
    return Seen(path.read_text(encoding="utf-8"))


# --- which samples ---


def chosen(values, metric=None, names=("share",)):
    samples = [sample(record, value) for record, value in values.items()]
    return {one.rank: (one.sample["id"], one.value) for one in choose(samples, names, {"share": metric or Share()})}


def test_best_median_and_worst_by_a_sample_s_own_value():
    values = {"a": 0.5, "b": 0.1, "c": 0.9, "d": 0.4, "e": 0.8}
    assert chosen(values) == {"best": ("c", 0.9), "median": ("a", 0.5), "worst": ("b", 0.1)}
    lower = Share(better="lower")
    assert chosen(values, lower) == {"best": ("b", 0.1), "median": ("a", 0.5), "worst": ("c", 0.9)}


def test_few_samples_are_not_shown_twice():
    assert chosen({"a": 0.5}) == {"best": ("a", 0.5)}
    assert chosen({"a": 0.5, "b": 0.6}) == {"best": ("b", 0.6), "worst": ("a", 0.5)}
    assert chosen({}) == {}


def test_samples_without_a_value_are_passed_over_and_ties_go_by_id():
    assert chosen({"z": None, "c": 1.0, "b": 1.0, "a": 0.0}) == {
        "best": ("b", 1.0),
        "median": ("c", 1.0),
        "worst": ("a", 0.0),
    }


def test_the_first_metric_that_is_known_and_judges_decides():
    assert chosen({"a": 0.5}, names=("unknown", "share")) == {"best": ("a", 0.5)}
    assert chosen({"a": 0.5}, names=("unknown",)) == {}


# --- the page ---


def test_the_page_has_metrics_samples_and_what_failed(tmp_path):
    samples = [sample("a", 0.9), sample("b", 0.5), sample("c", 0.0, failure="NoMask: nothing drawn", text="")]
    path = write_page(write(tmp_path, samples), metrics_of=known)
    assert path == tmp_path / "page" / "index.html"
    page = seen(path)
    assert page.open == []  # every tag is closed
    for text in ("share ↑", "0.500 [0.400, 0.600]", "best: share 0.900", "median: share 0.500", "worst: share 0.000",
                 "what of a?", "said a", "true c", "NoMask: nothing drawn", "OpenKBP, split validation",
                 "3 samples of 2 patients, 1 failed (NoMask 1)", "Not for clinical use"):  # fmt: skip
        assert text in page.text, text
    assert "SECRET-7" not in path.read_text()


def test_what_a_model_said_is_never_markup(tmp_path):
    hostile = '<script>alert(1)</script><img src=x onerror="a()">&amp;\x1b[31m'
    one = sample("<b>id</b>", 0.5, text=hostile, reference="'\"><i>", failure="<u>", task="<em>")
    path = write_page(write(tmp_path, [one]), metrics_of=known)
    page = seen(path)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "b", "i", "u", "em"})
    assert '<script>alert(1)</script><img src=x onerror="a()">&amp;\N{REPLACEMENT CHARACTER}[31m' in page.text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_needs_no_network_and_forbids_scripts(tmp_path):
    text = write_page(write(tmp_path, [sample("a", 0.5)]), metrics_of=known).read_text()
    assert "http:" not in text and "https:" not in text and "//" not in text
    assert "script-src 'none'" in text


def scan():
    array = np.full((12, 24, 20), -1000, np.float32)
    array[2:10, 4:20, 4:16] = 40
    mask = np.zeros(array.shape, bool)
    mask[4:8, 8:14, 6:12] = True
    return Volume(array, np.diag([2.0, 2.0, 2.0, 1.0])), mask


def test_overlays_have_truth_and_answer_and_lie_beside_the_page(tmp_path, monkeypatch):
    volume, mask = scan()
    drawn = []

    def picture(one):
        if one["task"] != "seg.sem":
            return None
        guess = (
            Finding("liver", mask=mask & False)
            if one["id"] == "none"
            else Finding("liver", box=Box((4, 8, 6), (8, 14, 12)))
        )
        return volume, [Finding("liver", mask=mask)], [guess]

    def spy(path, volume, findings, *, title, notes):
        drawn.append((path.name, [finding.name for finding in findings], title, notes))
        save_overlay(path, volume, findings, title=title, notes=notes)

    from m3d.inference.overlay import save_overlay

    monkeypatch.setattr("m3d.inference.overlay.save_overlay", spy)
    samples = [sample("a$b$", 0.9, task="seg.sem"), sample("none", 0.0, task="seg.sem"), sample("words", 0.5)]
    path = write_page(write(tmp_path, samples), picture=picture, metrics_of=known)
    assert drawn == [
        ("seg_sem_best.png", ["liver, truth", "liver, answer"], "seg.sem   a\\$b\\$", []),
        ("seg_sem_worst.png", ["liver, truth"], "seg.sem   none", ["The answer has nothing to draw."]),
    ]
    pictures = [attributes["src"] for tag, attributes in seen(path).tags if tag == "img"]
    assert pictures == ["seg_sem_best.png", "seg_sem_worst.png"]
    with Image.open(path.parent / pictures[0]) as image:
        assert image.width > 500
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["index.html", *pictures]


# --- whole or not at all ---


def test_an_earlier_page_is_replaced_whole(tmp_path):
    write(tmp_path, [sample("a", 0.5)])
    write_page(tmp_path, metrics_of=known)
    (tmp_path / "page" / "old.png").write_bytes(b"of a sample that is no longer shown")
    write_page(write(tmp_path, [sample("new", 0.5)]), metrics_of=known)
    assert [entry.name for entry in (tmp_path / "page").iterdir()] == ["index.html"]
    assert "said new" in (tmp_path / "page" / "index.html").read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "metrics.json",
        "page",
        "predictions.jsonl",
        "samples.jsonl",
    ]


def test_a_picture_that_fails_leaves_the_earlier_page_as_it_was(tmp_path):
    before = write_page(write(tmp_path, [sample("a", 0.5)]), metrics_of=known).read_bytes()

    def broken(one):
        raise OSError(f"scan of {one['id']} cannot be read")

    with pytest.raises(OSError, match="scan of b cannot be read"):
        write_page(write(tmp_path, [sample("b", 0.5)]), picture=broken, metrics_of=known)
    assert (tmp_path / "page" / "index.html").read_bytes() == before
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_folder_that_is_no_page_is_not_replaced(tmp_path):
    write(tmp_path, [sample("a", 0.5)])
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "thesis.doc").write_text("mine")
    with pytest.raises(FileExistsError, match="no page of a run"):
        write_page(tmp_path, metrics_of=known)
    assert (tmp_path / "page" / "thesis.doc").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "made_by"), [("metrics.json", "score"), ("samples.jsonl", "score"), ("predictions.jsonl", "run")]
)
def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path, name, made_by):
    write(tmp_path, [sample("a", 0.5)])
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: not there; `m3d bench {made_by}"):
        write_page(tmp_path, metrics_of=known)
    assert not (tmp_path / "page").exists()


def test_a_task_whose_samples_have_no_value_says_so(tmp_path):
    page = seen(write_page(write(tmp_path, [sample("a", None)]), metrics_of=known))
    assert "No sample has a value of its own" in page.text
