"""Tables from result files, whole and with some of them missing."""

import json

import pytest
import write_tables

from m3d.inference.checkpoints import resolve
from m3d.recipes.checkpoints import fingerprint

DOCUMENT = (
    "# Card\n\n<!-- accuracy -->\nold\n<!-- /accuracy -->\n\nbetween\n\n<!-- structures --><!-- /structures -->\n"
)


def entry(value: float, blind: float | None = None, **more) -> dict:
    row = {"n": 21, "patients": 21, "value": value, "low": value - 0.05, "high": value + 0.05, **more}
    if blind is not None:
        row |= {"blind": blind, "blind_low": blind, "blind_high": blind}
        row |= {"gain": value - blind, "gain_low": value - blind - 0.05, "gain_high": value - blind + 0.05}
    return row


def result(model: str, dice: float) -> dict:
    metrics = {
        "dice/mandible": entry(dice, 0.0),
        "dice/five": entry(dice, 0.0),
        "click/mandible": entry(0.5, 0.25),
        "iou/mandible": entry(0.4, 0.2),
        "vqa/volume": entry(0.5, 0.25, chance=0.25, unparsable=0.1),
        "vqa/mean": entry(0.5, 0.25, chance=0.25, unparsable=0.1),
        "vqa/gain": entry(0.25),
        "open/volume": entry(0.1, 0.0),
        "error/median": {**entry(0.3, 0.4), "high": None},
    }
    about = {"model": model, "parameters": 10_800_000, "patients": 21, "seconds": 600, "command": "python x.py"}
    return {**about, "metrics": metrics}


def retrieval() -> dict:
    row = {**entry(0.9), "chance": 5 / 21, "times_chance": 3.78}
    way = {**dict.fromkeys(("R@1", "R@5", "R@10", "MRR"), row), "median_rank": 2.0}
    pools = {"openkbp": {"n": 21, "candidates": 21, "volume_to_text": way, "text_to_volume": way}}
    return {"command": "python y.py", "split": "validation", "task": "retrieval", "pools": pools}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(write_tables, "RESULTS", tmp_path)

    def put(**files) -> None:
        for name, content in files.items():
            (tmp_path / f"{name.replace('__', '-')}.json").write_text(json.dumps(content), encoding="utf-8")

    return put


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_without_results_the_text_says_so_and_nothing_else_changes(results, capsys):
    text = write_tables.rewrite(DOCUMENT)
    missing = "Not measured yet: `benchmarks/results/accuracy_m3d-tiny.json` is not there."
    assert text.count(missing) == 2
    assert text.startswith("# Card\n\n<!-- accuracy -->\n")
    assert "\n\nbetween\n\n" in text
    assert missing in capsys.readouterr().out


def test_one_model_alone(results):
    results(accuracy_m3d__tiny=result("m3d-tiny", 0.61))
    text = write_tables.rewrite(DOCUMENT)
    assert lines_of(text, "|  | n |")[0] == "|  | n | m3d-tiny | m3d-tiny, blind | target |"
    five = lines_of(text, "| Dice by name, mean of five")[0]
    assert five.endswith("| 21 | 0.61 (0.56 to 0.66) | 0.00 (0.00 to 0.00) | 0.60, reached |")
    assert lines_of(text, "| Dice by name, mandible")[0].endswith("0.65, not reached |")
    assert lines_of(text, "| closed VQA, gain")[0].endswith("| 0.25 (0.20 to 0.30) | - | 0.20, reached |")
    assert "Not measured yet: m3d-smol, SegResNet, retrieval." in text
    assert lines_of(text, "| open VQA, median") == ["| open VQA, median relative error of numbers | 21 | 0.30 | "
                                                    "0.40 (0.40 to 0.40) |  |"]  # fmt: skip
    assert write_tables.rewrite(text) == text


def test_all_of_them_side_by_side(results):
    reference = {**result("MONAI SegResNet", 0.8), "metrics": {"dice/five": entry(0.8), "dice/mandible": entry(0.85)}}
    smol = result("m3d-smol", 0.3)
    del smol["metrics"]["click/mandible"]
    tiny = result("m3d-tiny", 0.61)
    results(accuracy_m3d__tiny=tiny, accuracy_m3d__smol=smol, segresnet_reference=reference, retrieval_tiny=retrieval())
    text = write_tables.rewrite(DOCUMENT)
    assert lines_of(text, "|  | n | m3d-tiny | m3d-smol | m3d-tiny, blind | SegResNet | target |")
    five = lines_of(text, "| Dice by name, mean of five")[0].split(" | ")
    assert [cell[:4] for cell in five[2:6]] == ["0.61", "0.30", "0.00", "0.80"]
    found = lines_of(text, "| retrieval R@5, scan to text, openkbp, 21 candidates (chance 0.238)")[0]
    assert found.endswith("| 0.90 (0.85 to 0.95) |  |  |  | 4 x chance, not reached |")
    assert "Not measured yet" not in text
    widths = {line.count(" | ") for line in text.split("<!-- /accuracy -->")[0].splitlines() if line.startswith("| ")}
    assert widths == {6}
    mandible = lines_of(text, "| mandible | 21 |")[0]
    assert mandible.count("0.85 (0.80 to 0.90)") == 1


def test_questions_and_retrieval(results):
    results(accuracy_m3d__tiny=result("m3d-tiny", 0.61), retrieval_tiny=retrieval())
    assert lines_of(write_tables.questions(), "| volume | 21 | 0.25 | 0.50 (0.45 to 0.55) | 0.25")
    assert "0.90 (0.85 to 0.95), chance 0.238" in lines_of(write_tables.retrieval(), "| openkbp | 21 of 21 | scan")[0]


def test_a_table_of_earlier_weights_says_so(results):
    shipped = fingerprint(resolve("m3d-tiny"))
    told = write_tables.EARLIER.format(model="m3d-tiny")
    for found, old in ((shipped, 0), ("0" * 64, 1)):
        results(accuracy_m3d__tiny={**result("m3d-tiny", 0.61), "fingerprint": found})
        assert write_tables.rewrite("<!-- accuracy --><!-- /accuracy -->").count(told) == old
    assert write_tables.weights_of({"model": {"id": "m3d-tiny", "fingerprint": "ab"}}) == ("m3d-tiny", "ab")


def test_every_marker_of_the_documents_is_known():
    for document in write_tables.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        names = {line[5:-4] for line in text.splitlines() if line.startswith("<!-- ") and not line.startswith("<!-- /")}
        assert names <= set(write_tables.BLOCKS), document


def test_the_tables_of_the_benchmark_are_those_of_scored_runs(results):
    metric = {"variant": "hard", "better": "higher", "unit": "", **entry(0.5, 0.25)}
    run = {
        "schema": "m3d.bench/1", "protocol": "standard", "grid": "scan", "model": {"id": "m3d-tiny"},
        "data": {"name": "openkbp", "split": "validation"},
        "tasks": {"seg.sem": {"n": 21, "patients": 21, "n_failed": 1, "failures": {}, "metrics": {"Dice": metric}}},
    }  # fmt: skip
    other = {**run, "model": {"id": "m3d-smol"}}
    speed = {
        "answers a second": {"apart": [1.0, 2.0, 3.0], "together": [10.0, 10.0, 10.0]}, "batch": 16, "answers": 64,
        "together / apart": {"median": 5.0}, "scans": 2, "rounds": 3, "command": "python z.py", "answers alike": 63,
    }  # fmt: skip
    retrieval = {**run, "tasks": {"retrieval": {**run["tasks"]["seg.sem"], "metrics": {"R@5": metric}}}}
    results(
        bench_m3d__tiny=run,
        bench_retrieval=retrieval,
        bench_few_m3d__tiny=run,
        bench_few_m3d__smol=other,
        bench_speed=speed,
    )
    text = write_tables.rewrite("<!-- bench --><!-- /bench --><!-- side_by_side --><!-- /side_by_side -->")
    rows = lines_of(text, "| seg.sem")
    assert [row.split("|")[3].strip() for row in rows] == ["m3d-tiny", "m3d-tiny", "m3d-smol"]
    assert all("0.500 [0.450, 0.550]" in row and "0.250" in row for row in rows)
    assert "21 patients; protocol standard; grid: scan" in text
    text = write_tables.rewrite("<!-- bench_retrieval --><!-- /bench_retrieval -->")
    assert len(lines_of(text, "| retrieval | R@5")) == 1 and "| seg.sem" not in text
    text = write_tables.rewrite("<!-- bench_speed --><!-- /bench_speed -->")
    assert "| ratio, median of rounds | 5.0 |" in text and "63 of 64 are word for word the same" in text


def test_published_numbers_stand_with_their_source_and_unread_systems_beneath():
    text = write_tables.rewrite("<!-- published --><!-- /published -->")
    (row,) = lines_of(text, "| seg.sem")
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["DSC", "SegVol", "0.8710", "own"]
    assert "arXiv 2411.03670" in row and "UMIT: none could be read (arXiv 2503.15892" in text


def test_kinds_of_prompts_stand_beneath_each_other(results):
    kinds = {"seg.sem by slice_box": {}, "seg.sem by mask+clicks": {"Dice of the given mask": entry(0.75)}}
    clicks = {f"Dice after {n} click{'s' * (n > 1)}": entry(0.6 + n / 100) for n in (1, 3, 5, 10)}
    clicks |= {"NoC@80": entry(7.25), "never Dice 0.8": entry(0.5)}
    kinds["seg.sem by mask+clicks"] |= clicks
    tasks = {
        name: {"n": 20, "patients": 3, "metrics": {"Dice": entry(0.5, 0.1), "NSD@3mm": entry(0.4), **more}}
        for name, more in kinds.items()
    }
    few = {"tasks": tasks, "model": {"id": "m3d-tiny"}, "command": "python k.py --limit 3"}
    results(bench_prompts_few_m3d__tiny=few)
    text = write_tables.rewrite("<!-- bench_prompts --><!-- /bench_prompts -->")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in lines_of(text, "| seg")]
    dice = ["20", "0.50 (0.45 to 0.55)", "0.10", "0.40"]
    assert rows == [
        ["seg.sem by slice\\_box", *dice, "-", "-", "-", "-", "-"],
        ["seg.sem by mask+clicks", *dice, "0.75", "0.61", "0.63", "0.65", "7.2 (50% never)"],
    ]
    assert "3 patients" in text and "An example, not a result" in text
    results(bench_prompts_m3d__tiny={**few, "command": "python k.py"})
    assert "An example" not in write_tables.rewrite("<!-- bench_prompts --><!-- /bench_prompts -->")


def test_clicks_stand_by_way_and_number(results):
    metrics = {f"clicks: {name}/five": entry(0.7) for name in ("dice@1", "dice@10", "noc80", "never80")}
    speed = {"clicks": {"median": 44.6}}
    clicks = {"ways": ["clicks"], "metrics": metrics, "milliseconds a click": speed, "patients": 21, "command": "c"}
    results(clicks=clicks)
    (row,) = lines_of(write_tables.rewrite("<!-- clicks --><!-- /clicks -->"), "| clicks")
    one = "0.70 (0.65 to 0.75)"
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["clicks", "-", one, "-", "-", one, one, one, "45"]


def test_a_bundle_stands_beside_the_model_it_was_made_of(results):
    row = {
        "n": 117, "model, mean of five": 0.731, "bundle, mean of five": 0.729, "agreement, mean": 0.972,
        "agreement, median": 0.98, "agreement, lowest": 0.91, "equal": 3,
    }  # fmt: skip
    about = {"command": "python z.py", "model": "m3d-tiny", "patients": 21}
    results(export_bundle={**about, "metrics": {"name": row}})
    told = write_tables.export_bundle()
    assert lines_of(told, "| name") == ["| name | 117 | 0.731 | 0.729 | 0.972 | 0.910 | 3 of 117 |"]
    assert "21 OpenKBP validation patients (`python z.py`)" in told
