"""Two runs compared: differences, permutation p-values and Holm's correction that are known by hand, and refusals."""

import argparse
import hashlib
import io
import json
from dataclasses import dataclass

import numpy as np
import pytest
from rich.console import Console

from m3d.bench.compare import compare, holm
from m3d.bench.metrics.base import mean
from m3d.cli.bench import compare as command
from m3d.cli.common import add_general_options


@dataclass(frozen=True)
class Share:
    """A mean of what stands in the samples."""

    name: str = "share"
    variant: str = "mean"
    better: str = "higher"
    unit: str = ""
    worst: tuple[float, ...] | None = (0.0,)

    def statistics(self, samples):
        raise AssertionError("comparing never looks at a sample again")

    def reduce(self, sums, counts):
        return mean(sums, counts)


@dataclass(frozen=True)
class Ratio(Share):
    """A corpus metric: its value is no mean of its samples' values."""

    name: str = "ratio"

    def reduce(self, sums, counts):
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[:, 0] / sums[:, 1]


def known(task, protocol):
    assert protocol == "standard"
    return (Share(), Ratio(), Share(name="distance", better="lower", unit="mm"))


def write(folder, values, *, name="share", task="vqa.closed", patients=None, tasks=None, changes=None, **run):
    """A scored run: ``values`` by record id, one patient each unless said."""
    folder.mkdir(exist_ok=True)
    lines = [
        {
            "id": record, "sight": "seeing", "task": task, "subtask": None, "image_id": f"image {record}",
            "patient_id": (patients or {}).get(record, f"patient {record}"), "group": "", "failure": None,
            "text": "said", "reference": "true", "statistics": {name: value if value is None else list(value)},
        } | (changes or {}).get(record, {})
        for record, value in values.items()
    ]  # fmt: skip
    blind = [line | {"sight": "blind", "statistics": {name: [99.0]}} for line in lines]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *blind]))
    better, unit = ("lower", "mm") if name == "distance" else ("higher", "")
    entry = {"variant": "mean", "better": better, "unit": unit, "value": 0.5, "low": 0.4, "high": 0.6, "n": 1}
    found = {
        "schema": "m3d.bench/1", "protocol": "standard", "grid": "scan", "model": {"id": folder.name},
        "data": {"name": "OpenKBP", "split": "validation"},
        "tasks": tasks or {task: {"n": len(values), "patients": 1, "n_failed": 0, "metrics": {name: entry}}},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(found | run))
    return folder


def pair(tmp_path, one, other, **more):
    return write(tmp_path / "A", one, **more), write(tmp_path / "B", other, **more)


# --- values and differences ---


def test_values_and_difference_are_of_the_samples_that_both_have(tmp_path):
    one = {"a": [1.0], "b": [1.0], "c": [0.0], "mine": [0.0]}
    other = {"c": [0.0], "b": [0.0], "a": [1.0], "theirs": [1.0], "theirs too": [1.0]}
    found = compare(*pair(tmp_path, one, other), metrics_of=known)
    [row] = found.rows
    assert (row.one, row.other) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert row.difference == pytest.approx(1 / 3)
    assert (row.n, row.patients) == (3, 3)
    coverage = found.coverage["vqa.closed"]
    assert (coverage.both, coverage.only_one, coverage.only_other) == (3, 1, 2)
    assert "vqa.closed: 3 samples in both, 1 only in A, 2 only in B" in list(found.notes())


def test_a_corpus_metric_is_made_of_sums(tmp_path):
    # A: (1 + 3) / (2 + 4), B: (2 + 3) / (2 + 4); a mean of ratios would give .625 and .875
    one, other = {"a": [1.0, 2.0], "b": [3.0, 4.0]}, {"a": [2.0, 2.0], "b": [3.0, 4.0]}
    [row] = compare(*pair(tmp_path, one, other, name="ratio"), metrics_of=known).rows
    assert (row.one, row.other) == (pytest.approx(4 / 6), pytest.approx(5 / 6))
    assert row.difference == pytest.approx(-1 / 6)


def test_a_sample_that_one_run_is_not_judged_on_is_left_out_of_both(tmp_path):
    one, other = {"a": [1.0], "b": None, "c": [0.5]}, {"a": [0.0], "b": [1.0], "c": [None]}
    [row] = compare(*pair(tmp_path, one, other), metrics_of=known).rows
    assert (row.one, row.other, row.difference, row.n) == (1.0, 0.0, 1.0, 1)


def test_where_nothing_is_judged_there_are_no_numbers_and_no_test(tmp_path):
    found = compare(*pair(tmp_path, {"a": None}, {"a": [1.0]}), metrics_of=known)
    [row] = found.rows
    assert (row.one, row.other, row.difference, row.low, row.p, row.p_holm, row.n) == (*[None] * 6, 0)
    assert found.num_tests == 0
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"][0]["p"] is None


def test_the_interval_of_a_constant_difference_is_that_difference(tmp_path):
    one = {name: [0.25 * place] for place, name in enumerate("abcd")}
    other = {name: [value - 0.125] for name, [value] in one.items()}
    [row] = compare(*pair(tmp_path, one, other), metrics_of=known).rows
    assert (row.difference, row.low, row.high) == (0.125, pytest.approx(0.125), pytest.approx(0.125))


# --- p-values ---


def test_p_of_one_patient_and_of_equal_runs_is_1(tmp_path):
    [row] = compare(*pair(tmp_path, {"a": [1.0]}, {"a": [0.0]}), metrics_of=known).rows
    assert row.p == 1.0
    same = {"a": [1.0], "b": [0.0]}
    [row] = compare(*pair(tmp_path, same, same), metrics_of=known).rows
    assert (row.difference, row.p, row.winner) == (0.0, 1.0, "")


@pytest.mark.parametrize(("num_patients", "exact"), [(2, 1 / 2), (3, 1 / 4), (5, 1 / 16)])
def test_p_of_patients_that_all_differ_alike_is_that_of_coins_that_all_agree(tmp_path, num_patients, exact):
    names = [str(number) for number in range(num_patients)]
    [row] = compare(*pair(tmp_path, {n: [1.0] for n in names}, {n: [0.0] for n in names}), metrics_of=known).rows
    assert row.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 2000))


def test_p_counts_every_exchange_that_differs_as_much(tmp_path):
    # patients differ by 3, 1, 1: of the 8 signs, +-(3+1+1) differ by 5, the observed; +-(3+1-1) by 3 (twice), ...
    one, other = {"a": [3.0], "b": [1.0], "c": [1.0]}, {"a": [0.0], "b": [0.0], "c": [0.0]}
    [row] = compare(*pair(tmp_path, one, other), metrics_of=known).rows
    assert row.p == pytest.approx(2 / 8, abs=0.04)
    # and by 3, -1, 1: |3| is observed; 3-1+1, 3+1-1, 3+1+1 and their negatives reach it: 6 of 8
    one, other = {"a": [3.0], "b": [0.0], "c": [1.0]}, {"a": [0.0], "b": [1.0], "c": [0.0]}
    [row] = compare(*pair(tmp_path, one, other), metrics_of=known).rows
    assert row.p == pytest.approx(6 / 8, abs=0.04)


def test_answers_of_one_patient_are_exchanged_together(tmp_path):
    names = [str(number) for number in range(12)]
    runs = {n: [1.0] for n in names}, {n: [0.0] for n in names}
    [row] = compare(*pair(tmp_path, *runs, patients=dict.fromkeys(names, "one")), metrics_of=known).rows
    assert (row.n, row.patients, row.p) == (12, 1, 1.0)
    [row] = compare(*pair(tmp_path, *runs), metrics_of=known).rows
    assert row.p < 0.005


# --- many tests ---


def test_holm_by_hand():
    # sorted .01, .02, .03, .5 times 4, 3, 2, 1: .04, .06, .06 (never below the one before), .5
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def both_tasks(tmp_path, one, other):
    """Runs with the same samples in two tasks."""
    folders = []
    entry = {"variant": "mean", "better": "higher", "unit": ""}
    for folder, values in (("A", one), ("B", other)):
        tasks = {task: {"metrics": {"share": entry}} for task in values}
        parts = []
        for task, found in values.items():
            written = write(tmp_path / folder, found, task=task, tasks=tasks)
            parts.append((written / "samples.jsonl").read_text())
        (tmp_path / folder / "samples.jsonl").write_text("".join(parts))
        folders.append(tmp_path / folder)
    return folders


def test_significance_is_corrected_over_all_tasks(tmp_path):
    clear = [f"c{number}" for number in range(14)]
    few = [f"f{number}" for number in range(6)]  # p is 1/32 alone, twice that with another test
    one = {"report": {n: [1.0] for n in clear}, "reg": {n: [1.0] for n in few}}
    other = {"report": {n: [0.0] for n in clear}, "reg": {n: [0.0] for n in few}}
    found = compare(*both_tasks(tmp_path, one, other), metrics_of=known)
    report, reg = found.rows
    assert (report.significant, report.winner) == (True, "A")
    assert report.p_holm == pytest.approx(2 * report.p)
    assert reg.p == pytest.approx(1 / 32, abs=0.016)
    assert reg.p_holm == pytest.approx(max(reg.p, 2 * report.p))
    assert any("2 tests were made" in note for note in found.notes())


def test_the_better_run_is_that_of_the_better_direction(tmp_path):
    names = [str(number) for number in range(14)]
    [row] = compare(
        *pair(tmp_path, {n: [1.0] for n in names}, {n: [5.0] for n in names}, name="distance"), metrics_of=known
    ).rows
    assert (row.difference, row.better, row.winner) == (-4.0, "lower", "A")


# --- refusals ---


@pytest.mark.parametrize(("key", "value"), [("protocol", "m3d"), ("grid", "store")])
def test_runs_that_were_scored_otherwise_are_refused(tmp_path, key, value):
    one = write(tmp_path / "A", {"a": [1.0]})
    other = write(tmp_path / "B", {"a": [1.0]}, **{key: value})
    with pytest.raises(ValueError, match=rf"{key} differs: .* in .*A, '{value}' in .*B; .*m3d bench score"):
        compare(one, other, metrics_of=known)


def test_another_variant_is_refused(tmp_path):
    one = write(tmp_path / "A", {"a": [1.0]})
    entry = {"variant": "median", "better": "higher", "unit": ""}
    other = write(tmp_path / "B", {"a": [1.0]}, tasks={"vqa.closed": {"metrics": {"share": entry}}})
    with pytest.raises(ValueError, match=r"vqa.closed, share: variant 'mean' in .*A, 'median' in .*B"):
        compare(one, other, metrics_of=known)


@pytest.mark.parametrize("key", ["reference", "patient_id", "image_id", "task", "subtask"])
def test_another_record_of_the_same_id_is_refused(tmp_path, key):
    one = write(tmp_path / "A", {"a": [1.0], "b": [1.0]})
    other = write(tmp_path / "B", {"a": [1.0], "b": [1.0]}, changes={"b": {key: "another"}})
    with pytest.raises(ValueError, match=rf"record 'b' is not the same in both: {key} is .* and 'another'"):
        compare(one, other, metrics_of=known)


def test_runs_that_share_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no record in common"):
        compare(*pair(tmp_path, {"a": [1.0]}, {"b": [1.0]}), metrics_of=known)


def test_ranks_in_different_pools_are_refused(tmp_path):
    folders = pair(tmp_path, {"a": [1.0], "b": [1.0]}, {"a": [1.0]}, task="retrieval")
    with pytest.raises(ValueError, match=r"retrieval: 1 samples only in .*A and 0 only in .*B, so the pools differ"):
        compare(*folders, metrics_of=known)


def test_a_run_that_was_not_scored_is_named(tmp_path):
    one = write(tmp_path / "A", {"a": [1.0]})
    (tmp_path / "B").mkdir()
    with pytest.raises(FileNotFoundError, match=r"B/metrics\.json: not there; `m3d bench score .*B` makes it"):
        compare(one, tmp_path / "B", metrics_of=known)


def test_metrics_that_cannot_be_compared_are_said(tmp_path):
    entry = {"variant": "mean", "better": "higher", "unit": ""}
    one = write(tmp_path / "A", {"a": [1.0]}, tasks={"reg": {"metrics": {"share": entry, "judge": entry}}}, task="reg")
    tasks = {"reg": {"metrics": {"share": entry, "judge": entry, "ratio": entry}}}
    other = write(tmp_path / "B", {"a": [1.0]}, tasks=tasks, task="reg")
    found = compare(one, other, metrics_of=known)
    assert [row.metric for row in found.rows] == ["share"]
    assert found.left_out == (
        "reg, judge: not compared, no metric of that name is known",
        "reg, ratio: not compared, only B has it",
    )


def test_ranks_in_pools_that_were_drawn_otherwise_are_refused(tmp_path):
    values = {"a": [1.0], "b": [1.0], "c": [1.0]}
    drawn = ({"2": "ab", "3": "abc"}, {"2": "ac", "3": "abc"}, {"3": "abc"})
    one, *others = (
        write(tmp_path / letter, values, task="retrieval", tasks={"retrieval": {"metrics": {}, "pools": {
            name: {"n": len(ids), "ids_sha256": hashlib.sha256(ids.encode()).hexdigest()} for name, ids in pools.items()
        }}})
        for letter, pools in zip("ABC", drawn, strict=True)
    )  # fmt: skip
    for other in others:
        with pytest.raises(ValueError, match=r"pool 2 in .*A is not that in .*[BC], so ranks do not compare"):
            compare(one, other, metrics_of=known)
    assert compare(one, one, metrics_of=known).coverage["retrieval"].both == 3


def test_ranks_of_one_pool_are_compared_and_the_median_of_which_no_samples_are_kept_is_not(tmp_path):
    found_, median = "R@1 image to text, pool 3", "median rank image to text, pool 3"
    entry = {"variant": "rank", "better": "higher", "unit": ""}
    tasks = {"retrieval": {"metrics": {found_: entry, median: entry}}}
    one = write(tmp_path / "A", {"a": [1.0], "b": [1.0], "c": [0.0]}, name=found_, task="retrieval", tasks=tasks)
    other = write(tmp_path / "B", {"a": [1.0], "b": [0.0], "c": [0.0]}, name=found_, task="retrieval", tasks=tasks)
    found = compare(one, other)
    [row] = found.rows
    assert (row.metric, row.one, row.other) == (found_, pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found.left_out == (f"retrieval, {median}: not compared, its samples are not kept",)


def test_what_depends_on_the_whole_set_is_compared_on_the_same_set_only(tmp_path):
    def cider(task, protocol):
        return (Share(name="CIDEr"),)

    one, other = {"a": [1.0], "b": [0.0]}, {"a": [0.0], "b": [0.0]}
    [row] = compare(*pair(tmp_path, one, other, name="CIDEr"), metrics_of=cider).rows
    assert row.difference == 0.5
    found = compare(*pair(tmp_path, one, {"a": [0.0]}, name="CIDEr"), metrics_of=cider)
    assert found.rows == ()
    assert "its values depend on the whole set" in found.left_out[0]


def test_a_task_without_metrics_is_said(tmp_path):
    found = compare(*pair(tmp_path, {"a": [1.0]}, {"a": [1.0]}, task="landmark"))
    assert found.left_out == ("landmark, share: not compared, no metric of that name is known",)


def test_the_other_protocol_has_files_of_its_own(tmp_path):
    folders = pair(tmp_path, {"a": [1.0]}, {"a": [0.0]})
    with pytest.raises(FileNotFoundError, match=r"metrics\.m3d\.json: not there; `m3d bench score .*A --protocol m3d`"):
        compare(*folders, protocol="m3d", metrics_of=lambda task, protocol: (Share(),))
    for folder in folders:
        for name in ("metrics.json", "samples.jsonl"):
            (folder / name).rename(folder / name.replace(".", ".m3d.", 1))
    [row] = compare(*folders, protocol="m3d", metrics_of=lambda task, protocol: (Share(),)).rows
    assert row.difference == 1.0


# --- what is printed ---


def test_markdown_and_terminal_say_the_same(tmp_path):
    names = [str(number) for number in range(14)]
    found = compare(*pair(tmp_path, {n: [1.0] for n in names}, {n: [0.0] for n in names}), metrics_of=known)
    [line] = [line for line in found.markdown().splitlines() if line.startswith("| vqa.closed")]
    assert line.startswith("| vqa.closed | share ↑ | 1.000 | 0.000 | +1.000 [+1.000, +1.000] | ")
    assert line.endswith(" \\* | A | 14 | 14 |")
    stream = io.StringIO()
    Console(file=stream, width=160).print(found.terminal())
    assert "+1.000 [+1.000, +1.000]" in stream.getvalue()
    assert "A = A: data: OpenKBP, split validation; protocol: standard; grid: scan" in stream.getvalue()


def test_the_command_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("m3d.bench.compare.compare.__kwdefaults__", {"metrics_of": known})
    parser = argparse.ArgumentParser()
    command.configure(parser)
    add_general_options(parser, device=False)
    folders = list(map(str, pair(tmp_path, {"a": [1.0]}, {"a": [0.0]})))
    assert command.run(parser.parse_args([*folders, "--json", "--out", str(tmp_path / "out")])) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["num_tests"], printed["rows"][0]["difference"]) == (1, 1.0)
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == printed
    assert "| vqa.closed | share" in (tmp_path / "out" / "compare.md").read_text()
    assert command.run(parser.parse_args(folders)) == 0
    assert "1 tests were made" in capsys.readouterr().out
