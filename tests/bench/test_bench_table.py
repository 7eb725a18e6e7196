"""The table of scored runs: its numbers, its notes, published numbers only where they belong, and `m3d bench table`."""

import io
import json

import pytest
from rich.console import Console

from m3d.bench.scored import read_metrics, read_samples, statistics_of
from m3d.bench.table import interval, labels_of, markdown, number, published_numbers, sheet, terminal, unread_systems
from m3d.cli.bench import table as command


def entry(value=0.5, **more):
    return {
        "variant": "nltk 3.9, exact and stem", "better": "higher", "unit": "", "value": value, "low": 0.4, "high": 0.6,
        "n": 12, "patients": 3, **more,
    }  # fmt: skip


def run_of(tasks=None, *, model="m3d-tiny", protocol="standard", data="OpenKBP"):
    return {
        "schema": "m3d.bench/1", "protocol": protocol, "grid": "scan", "model": {"id": model, "fingerprint": "ab12"},
        "data": {"name": data, "split": "validation"},
        "bootstrap": {"over": "patients", "resamples": 2000, "seed": 0, "interval": 0.95},
        "tasks": tasks if tasks is not None else {
            "report": {"n": 12, "patients": 3, "n_failed": 2, "failures": {"NoText": 2}, "seconds": 3.0,
                       "metrics": {"METEOR": entry()}},
        },
    }  # fmt: skip


def task(**metrics):
    return {"n": 12, "patients": 3, "n_failed": 0, "failures": {}, "seconds": 1.0, "metrics": metrics}


def cells(text):
    """Rows of the one Markdown table, as dicts by heading."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


# --- numbers ---


def test_numbers_have_three_digits_or_two_and_a_unit():
    assert number(0.12345) == "0.123"
    assert number(12.346, "mm") == "12.35 mm"
    assert number(0.1, signed=True) == "+0.100"
    assert number(None) == "-"
    assert interval(0.5, 0.4, 0.6) == "0.500 [0.400, 0.600]"
    assert interval(-0.5, -0.75, 0.25, signed=True) == "-0.500 [-0.750, +0.250]"
    assert interval(3.0, 2.0, 4.5, "mm") == "3.00 mm [2.00, 4.50]"
    assert interval(3.0, -2.0, 4.5, "mm", signed=True) == "+3.00 mm [-2.00, +4.50]"
    assert interval(0.5, None, None) == "0.500"
    assert interval(None, None, None) == "-"


# --- one run ---


def test_a_run_has_its_value_blind_twin_gain_chance_and_failures():
    found = entry(blind=0.3, blind_low=0.2, blind_high=0.4, gain=0.2, gain_low=0.1, gain_high=0.3, chance=0.25)
    tasks = {"vqa.closed": {**task(exact=found), "n_failed": 1, "failures": {"NoOption": 1}}}
    [row] = cells(markdown([run_of(tasks)]))
    assert row == {
        "task": "vqa.closed", "metric": "exact ↑", "model": "m3d-tiny", "value [95 % CI]": "0.500 [0.400, 0.600]",
        "blind": "0.300", "gain [95 % CI]": "+0.200 [+0.100, +0.300]", "chance": "0.250", "n": "12", "failed": "1",
    }  # fmt: skip
    text = markdown([run_of(tasks)])
    assert "m3d-tiny, vqa.closed: 1 of 12 failed, counted as worst (NoOption 1)" in text
    assert "exact: nltk 3.9, exact and stem" in text
    assert "protocol: standard; grid: scan; intervals: 95 %, bootstrap of 2000 resamples over patients" in text
    assert "Not for clinical use" in text


def test_null_is_a_dash_and_a_column_of_nothing_is_left_out():
    tasks = {"rec.box3d": task(IoU=entry(None, low=None, high=None), Acc=entry(0.25, low=None, high=None))}
    rows = cells(markdown([run_of(tasks)]))
    assert [row["value [95 % CI]"] for row in rows] == ["-", "0.250"]
    assert {"blind", "gain [95 % CI]", "chance", "group"}.isdisjoint(rows[0])


def test_groups_are_shown_when_asked_and_their_mean_always_beside():
    dice = entry(0.6, mean_of_groups={"value": 0.7, "low": None, "high": None}, groups={"mandible": entry(0.8)})
    run = run_of({"seg.ref": task(Dice=dice)})
    [row] = cells(markdown([run]))
    assert (row["value [95 % CI]"], row["mean of groups"]) == ("0.600 [0.400, 0.600]", "0.700")
    rows = cells(markdown([run], groups=True))
    assert [(row["group"], row["value [95 % CI]"][:5]) for row in rows] == [("", "0.600"), ("mandible", "0.800")]


def test_lower_is_better_has_an_arrow_down_and_its_unit():
    tasks = {"seg.sem": task(HD95=entry(4.0, low=3.0, high=5.5, better="lower", unit="mm"))}
    [row] = cells(markdown([run_of(tasks)]))
    assert (row["metric"], row["value [95 % CI]"]) == ("HD95 ↓", "4.00 mm [3.00, 5.50]")


def test_names_cannot_break_the_table_nor_become_markup():
    text = markdown([run_of(model="a|b\n<script>*x*\x1b[31m")])
    [row, *_] = cells(text)
    assert row["model"] == "a\\|b &lt;script>\\*x\\*\N{REPLACEMENT CHARACTER}[31m"


# --- several runs ---


def test_runs_stand_beneath_each_other_metric_by_metric():
    one = run_of({"seg.sem": task(Dice=entry(0.5), NSD=entry(0.6)), "reg": task(BLEU=entry(0.1))}, model="tiny")
    two = run_of({"seg.sem": task(Dice=entry(0.7)), "rec.box3d": task(IoU=entry(0.2))}, model="smol")
    rows = cells(markdown([one, two]))
    assert [(row["task"], row["metric"][:-2], row["model"]) for row in rows] == [
        ("seg.sem", "Dice", "tiny"), ("seg.sem", "Dice", "smol"), ("seg.sem", "Dice", "SegVol [1]"),
        ("seg.sem", "NSD", "tiny"), ("reg", "BLEU", "tiny"), ("rec.box3d", "IoU", "smol"),
    ]  # fmt: skip


def test_runs_of_one_model_are_told_apart():
    assert labels_of([run_of(model="a"), run_of(model="b")]) == ["a", "b"]
    assert labels_of([run_of(protocol="m3d"), run_of()]) == ["m3d-tiny (m3d)", "m3d-tiny (standard)"]
    assert labels_of([run_of(), run_of()]) == ["m3d-tiny (standard) #1", "m3d-tiny (standard) #2"]


def test_no_run_and_too_few_labels_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        sheet([])
    with pytest.raises(ValueError, match="2 runs need as many labels, got 1"):
        sheet([run_of(), run_of()], labels=["a"])


# --- published numbers ---


def printed(source: str) -> dict[tuple[str, str, str], float]:
    found = (number_ for number_ in published_numbers() if number_.paper.startswith(source))
    return {(number_.task, number_.metric, number_.model): round(100 * number_.value, 2) for number_ in found}


def test_published_numbers_are_those_of_the_abstract_of_med3dvlm():
    # "61.00% R@1 on 2,000 samples (19.10%)", METEOR "36.42% (vs. 14.38%)", open VQA METEOR "36.76% (vs. 33.58%)",
    # closed-ended accuracy "79.95% (vs. 75.78%)": arXiv 2503.20047v2
    assert printed("Med3DVLM") == {
        ("retrieval", "R@1", "Med3DVLM"): 61.0, ("retrieval", "R@1", "M3D-LaMed"): 19.1,
        ("report", "METEOR", "Med3DVLM"): 36.42, ("report", "METEOR", "M3D-LaMed"): 14.38,
        ("vqa.open", "METEOR", "Med3DVLM"): 36.76, ("vqa.open", "METEOR", "M3D-LaMed"): 33.58,
        ("vqa.closed", "accuracy", "Med3DVLM"): 79.95, ("vqa.closed", "accuracy", "M3D-LaMed"): 75.78,
    }  # fmt: skip


def test_published_numbers_are_those_of_the_table_of_medm_vl():
    # README of MSIIP/MedM-VL, table 1; METEOR and accuracy of M3D-LaMed there are those of the abstract above
    heads = [("report", name) for name in ("BLEU-1", "ROUGE-1", "METEOR")] + [("vqa.closed", "accuracy")]
    heads += [("vqa.open", name) for name in ("BLEU-1", "ROUGE-1", "METEOR")]
    table = {
        "RadFM": (12.23, 16.49, 11.57, 19.79, 16.39, 26.13, 21.33),
        "M3D-LaMed": (15.15, 19.55, 14.38, 75.78, 49.38, 52.39, 33.58),
        "MedM-VL": (49.81, 52.45, 49.27, 80.12, 56.56, 59.96, 39.75),
    }
    cells = {(*head, model): value for model, row in table.items() for head, value in zip(heads, row, strict=True)}
    repeated = {key for key in printed("Med3DVLM") if key[2] == "M3D-LaMed"} & set(cells)
    assert len(repeated) == 3 and all(printed("Med3DVLM")[key] == cells[key] for key in repeated)
    assert printed("MedM-VL") == {key: value for key, value in cells.items() if key not in repeated}
    others = [number_ for number_ in published_numbers() if number_.paper.startswith("MedM-VL")]
    assert all(("copied" in number_.note) == (number_.model != "MedM-VL") for number_ in others)


def test_published_numbers_of_segvol_and_pmc_clip_are_those_that_others_measured():
    # leaderboard.csv of MrGiovanni/Touchstone: "SegVol,Average,DSC,87.1,10"; doi 10.1371/journal.pone.0344978, table 1:
    # "PMC-CLIP | Pretrained | 75.19 | 86.91 | 76.43 | 87.80", image to text and text to image, top-1 and top-2
    [segvol] = [number_ for number_ in published_numbers() if number_.model == "SegVol"]
    assert (segvol.value, segvol.data) == (pytest.approx(0.871), "Touchstone 1.0")
    assert segvol.fits("seg.sem", "Dice") and not segvol.fits("seg.sem by point", "Dice")
    beside = {
        name: [number_.value for number_ in published_numbers() if number_.model == "PMC-CLIP" and
               number_.fits("retrieval", name)]
        for name in ("R@1 image to text, pool 1000", "R@1 IR, pool 1000", "R@1 text to image, pool 1000",
                     "R@1 TR, pool 1000", "R@1 image to text, pool 21")
    }  # fmt: skip
    to_text, to_image = [pytest.approx(0.7519)], [pytest.approx(0.7643)]
    assert list(beside.values()) == [to_text, to_text, to_image, to_image, []]


def test_systems_without_a_readable_number_are_named_beneath():
    assert set(unread_systems()) == {"UMIT"} and "arXiv 2503.15892" in unread_systems()["UMIT"]
    assert any(note.startswith("UMIT: no published number could be read (arXiv") for note in sheet([run_of()]).notes)
    assert not {number_.model for number_ in published_numbers()} & set(unread_systems())


def test_every_published_number_says_where_it_stands_and_how_it_was_taken():
    sources = [number_.where + number_.paper for number_ in published_numbers()]
    assert all("arXiv" in source or "doi" in source for source in sources)
    assert all(number_.data and number_.note for number_ in published_numbers())
    own = {number_.model for number_ in published_numbers() if number_.protocol == "own"}
    assert own == {"SegVol", "PMC-CLIP"}
    assert {number_.protocol for number_ in published_numbers()} == {"m3d", "own"}


def test_published_numbers_stand_only_beside_the_same_task_and_metric():
    tasks = {"report": task(METEOR=entry(), CIDEr=entry()), "reg": task(METEOR=entry())}
    rows = cells(markdown([run_of(tasks)]))
    assert [(row["task"], row["metric"][:-2], row["model"], row["value [95 % CI]"]) for row in rows] == [
        ("report", "METEOR", "m3d-tiny", "0.500 [0.400, 0.600]"),
        ("report", "METEOR", "Med3DVLM [1]", "0.3642"),
        ("report", "METEOR", "M3D-LaMed [1]", "0.1438"),
        ("report", "METEOR", "MedM-VL [2]", "0.4927"),
        ("report", "METEOR", "RadFM [3]", "0.1157"),
        ("report", "CIDEr", "m3d-tiny", "0.500 [0.400, 0.600]"),
        ("reg", "METEOR", "m3d-tiny", "0.500 [0.400, 0.600]"),
    ]  # fmt: skip


def test_accuracy_by_likelihood_and_small_pools_are_not_comparable():
    closed = [number_ for number_ in published_numbers() if number_.task == "vqa.closed"]
    assert all(number_.fits("vqa.closed", "accuracy") for number_ in closed)
    assert not any(number_.fits("vqa.closed", "accuracy by likelihood") for number_ in closed)
    pooled = [number_ for number_ in published_numbers() if number_.task == "retrieval" and number_.data == "M3D-Cap"]
    for name in ("R@1 image to text, pool 2000", "R@1 TR, pool 2000"):
        assert all(number_.fits("retrieval", name) for number_ in pooled)
    for name in ("R@1 image to text, pool 100", "R@10 IR, pool 2000", "MRR image to text, pool 2000"):
        assert not any(number_.fits("retrieval", name) for number_ in pooled)


def test_the_footnote_says_source_protocol_and_that_the_data_are_others():
    notes = sheet([run_of()]).notes
    [footnote] = [note for note in notes if note.startswith("[1]")]
    assert "arXiv 2503.20047v2, abstract: METEOR with protocol m3d, beside protocol standard here" in footnote
    assert "on M3D-Cap (other data)" in footnote
    assert any("nothing follows from a difference" in note for note in notes)


@pytest.mark.parametrize("name", ["M3D-Bench", "M3D-Cap", "m3d-cap test"])
def test_on_the_same_data_set_nothing_warns(name):
    notes = sheet([run_of(data=name, protocol="m3d")]).notes
    [footnote] = [note for note in notes if note.startswith("[1]")]
    assert "METEOR with protocol m3d; on M3D-Cap (the data set of these runs)" in footnote
    assert not any("nothing follows" in note for note in notes)


def test_one_run_of_other_data_is_enough_for_the_warning():
    notes = sheet([run_of(data="M3D-Cap"), run_of(data="OpenKBP")]).notes
    assert any("nothing follows from a difference" in note for note in notes)


# --- terminal, JSON, files ---


def test_the_terminal_shows_the_same_numbers_and_takes_no_markup_from_names():
    stream = io.StringIO()
    Console(file=stream, width=160).print(terminal([run_of(model="[red]x[/red]\x1b[2J")]))
    shown = stream.getvalue()
    assert "[red]x[/red]" in shown
    assert "\x1b" not in shown
    assert "0.500 [0.400, 0.600]" in shown
    assert "Med3DVLM [1]" in shown


def test_the_sheet_is_plain_json():
    found = json.loads(json.dumps(sheet([run_of()]).to_dict(), allow_nan=False))
    assert found["rows"][0]["value"] == 0.5
    assert found["rows"][1]["footnote"] == 1
    assert found["runs"][0]["model"] == "m3d-tiny (ab12)"


def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; `m3d bench run --out .*nowhere` makes it"):
        read_metrics(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"metrics\.json: not there; `m3d bench score .*` makes it"):
        read_metrics(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"samples\.jsonl: not there; `m3d bench score .*` makes it"):
        read_samples(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no JSON"), ("[]", "no JSON object"), ('{"schema": "m3d.bench/0"}', "schema 'm3d.bench/0'"),
     ('{"schema": "m3d.bench/1"}', "no tasks")],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path, text, message):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=rf"metrics\.json: {message}.*m3d bench score"):
        read_metrics(tmp_path)


def test_nan_in_a_file_is_no_number(tmp_path):
    run = run_of({"reg": task(BLEU=entry(float("nan"), low=float("nan"), high=float("inf")))})
    (tmp_path / "metrics.json").write_text(json.dumps(run))
    assert "NaN" in (tmp_path / "metrics.json").read_text()
    [row] = cells(markdown([read_metrics(tmp_path)]))
    assert row["value [95 % CI]"] == "-"


def test_samples_are_read_by_sight_and_twice_is_an_error(tmp_path):
    lines = [{"id": "a", "sight": "seeing"}, {"id": "a", "sight": "blind"}, {"id": "b"}]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert list(read_samples(tmp_path)) == ["a", "b"]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, [*lines, lines[0]])))
    with pytest.raises(ValueError, match=r"samples\.jsonl:4: 'a' is there twice"):
        read_samples(tmp_path)


def test_statistics_that_are_not_there_are_nan_rows():
    rows = [{"statistics": {"x": [1.0, 2.0]}}, {"statistics": {}}, {"statistics": {"x": None}}, {},
            {"statistics": {"x": [None, 3.0]}}]  # fmt: skip
    found = statistics_of(rows, "x")
    assert found[0].tolist() == [1.0, 2.0]
    assert (found[1:] != found[1:]).all()
    assert statistics_of(rows, "y").shape == (5, 1)
    with pytest.raises(ValueError, match="rows of 1 and 2 statistics"):
        statistics_of([*rows, {"statistics": {"x": [1.0]}}], "x")


# --- the command ---


@pytest.fixture
def arguments(tmp_path):
    import argparse

    from m3d.cli.common import add_general_options

    parser = argparse.ArgumentParser()
    command.configure(parser)
    add_general_options(parser, device=False)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "metrics.json").write_text(json.dumps(run_of()))
    return lambda *words: parser.parse_args([str(tmp_path / "one"), *map(str, words)])


def test_the_command_prints_a_table_markdown_or_json(arguments, capsys):
    assert command.run(arguments()) == 0
    assert "METEOR" in capsys.readouterr().out
    assert command.run(arguments("--markdown")) == 0
    assert cells(capsys.readouterr().out)[0]["model"] == "m3d-tiny"
    assert command.run(arguments("--json")) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["metric"] == "METEOR"


def test_the_command_writes_table_md_and_does_not_replace_it(arguments, tmp_path):
    command.run(arguments("--out", tmp_path / "out"))
    assert cells((tmp_path / "out" / "table.md").read_text(encoding="utf-8"))[0]["task"] == "report"
    with pytest.raises(FileExistsError, match="--force"):
        command.run(arguments("--out", tmp_path / "out"))


def test_both_protocols_stand_beneath_each_other(arguments, tmp_path, capsys):
    (tmp_path / "one" / "metrics.m3d.json").write_text(json.dumps(run_of(protocol="m3d")))
    command.run(arguments("--protocol", "both", "--markdown"))
    assert [row["model"] for row in cells(capsys.readouterr().out)][:2] == ["m3d-tiny (standard)", "m3d-tiny (m3d)"]
