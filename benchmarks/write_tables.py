"""Write the stored results into the documents, so that no number there is typed by hand.

python benchmarks/write_tables.py          # rewrites the marked blocks of README.md, MODEL_CARD.md and docs/

What has not been measured is left out, and the text says so; also where a table is of earlier weights than those that
ship.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from m3d.bench.table import markdown_table, published_numbers, sheet, unread_systems
from m3d.inference.checkpoints import resolve
from m3d.recipes.checkpoints import fingerprint

HOME = Path(__file__).parents[1]
RESULTS = HOME / "benchmarks" / "results"
DOCUMENTS = (HOME / "README.md", HOME / "MODEL_CARD.md", *sorted((HOME / "docs").glob("*.md")))
MODELS = ("m3d-tiny", "m3d-smol")  # the first one is what the targets and the blind twin are of
REFERENCE = "segresnet_reference.json"
SUMMARY: tuple[tuple[str, str, float | None], ...] = (  # what it is, its metric, and what it should reach
    ("Dice by name, mean of five structures", "dice/five", 0.60),
    ("Dice by name, mandible", "dice/mandible", 0.65),
    ("Dice by name, all structures", "dice/mean", None),
    ("surface Dice at 3 mm by name, five", "nsd/five", None),
    ("Dice by one click, five", "click/five", None),
    ("Dice by a box, five", "box/five", None),
    ("Dice by name and click, five", "name+click/five", None),
    ("Dice by name and box, five", "name+box/five", None),
    ("box IoU, all structures", "iou/mean", 0.35),
    ("closed VQA, accuracy", "vqa/mean", None),
    ("closed VQA, gain over the blind twin", "vqa/gain", 0.20),
    ("open VQA, exact answers", "open/mean", None),
    ("open VQA, numbers within 20 %", "within20/mean", None),
    ("open VQA, median relative error of numbers", "error/median", None),
    ("naming what is in a box", "reg/mean", None),
    ("report, share of the true facts that it says", "report/recall", None),
    ("report, share of what it says that is true", "report/precision", None),
)
TELLING = ("BLEU-4", "METEOR", "accuracy", "number within 20%", "names the structure", "IoU", "Dice")
CLICKS = (1, 3, 5)  # after how many clicks Dice is told
TIMES_CHANCE = 4.0  # what retrieval should reach
WAYS = {"volume_to_text": "scan to text", "text_to_volume": "text to scan"}
Metrics = Mapping[str, Mapping[str, Any]]
EARLIER = "Measured with earlier weights of `{model}` than those that ship."
_weights_read: list[tuple[str, str | None]] = []  # models and fingerprints of the results of a table


def read(name: str) -> dict[str, Any]:
    """A result.

    Raises:
        FileNotFoundError: It has not been measured.
    """
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    _weights_read.append(weights_of(found))
    return found


def weights_of(result: Mapping[str, Any]) -> tuple[str, str | None]:
    """The model that a result is of, and its fingerprint where it says it."""
    model = result.get("model") or result.get("checkpoint") or ""
    if isinstance(model, Mapping):
        return str(model["id"]), model.get("fingerprint")
    return str(model), result.get("fingerprint")


def told_age(weights: Sequence[tuple[str, str | None]]) -> str:
    """That some of these are not the weights that ship; empty where all are, or are of models that do not."""
    shipped = fingerprint(resolve(MODELS[0]))
    old = any(model == MODELS[0] and found not in (None, shipped) for model, found in weights)
    return EARLIER.format(model=MODELS[0]) if old else ""


def there(name: str) -> dict[str, Any] | None:
    """A result, None where it has not been measured."""
    return read(name) if (RESULTS / name).is_file() else None


def accuracies() -> dict[str, dict[str, Any]]:
    """The results of all models that have been measured.

    Raises:
        FileNotFoundError: None has.
    """
    found = {model: result for model in MODELS if (result := there(f"accuracy_{model}.json")) is not None}
    return found or {MODELS[0]: read(f"accuracy_{MODELS[0]}.json")}


# -- cells ------------------------------------------------------------------------------------------------------------


def cell(row: Mapping[str, Any] | None, key: str = "value") -> str:
    """A value with its interval: ``0.62 (0.55 to 0.68)``; ``-`` where it was not measured."""
    if row is None or row.get(key) is None:
        return "-"
    prefix = "" if key == "value" else f"{key}_"
    low, high = row.get(f"{prefix}low"), row.get(f"{prefix}high")
    spread = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return f"{row[key]:.2f}{spread}"


def target(value: float | None, wanted: float | None, form: str = "{:.2f}") -> str:
    """What should be reached, and whether it is."""
    if wanted is None:
        return ""
    said = form.format(wanted)
    return said if value is None else f"{said}, {'reached' if value >= wanted else 'not reached'}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- the models -------------------------------------------------------------------------------------------------------


def accuracy() -> str:
    """The summary: models, blind twin, SegResNet and targets beside each other."""
    results, reference, found = accuracies(), there(REFERENCE), there("retrieval_tiny.json")
    first = next(iter(results))
    heads = ["", "n", *results, f"{first}, blind", *(["SegResNet"] if reference else []), "target"]
    rows = []
    for title, metric, wanted in SUMMARY:
        each = [result["metrics"].get(metric) for result in results.values()]
        own = results[first]["metrics"].get(metric)
        if not any(each):
            continue
        cells = [*map(cell, each), cell(own, "blind")]
        cells += [cell(reference["metrics"].get(metric))] if reference else []
        count = next(row["n"] for row in each if row)
        reached = target(own.get("value") if own and first == MODELS[0] else None, wanted)
        rows.append([title, str(count), *cells, reached])
    rows += retrieval_rows(found, len(heads)) if found else []
    missing = [name for name in MODELS if name not in results and there(f"bench_few_{name}.json") is None]
    missing += [] if reference else ["SegResNet"]
    missing += [] if found else ["retrieval"]
    told = [about(result) for result in results.values()] + ([about_reference(reference)] if reference else [])
    told += [f"Not measured yet: {', '.join(missing)}."] if missing else []
    return "\n".join([markdown(heads, rows), "", *told])


def retrieval_rows(found: Mapping[str, Any], width: int) -> list[list[str]]:
    """R@5 of each pool and direction, as rows of the summary; chance stands in the title."""
    rows = []
    for pool, scores in found["pools"].items():
        for way, words in WAYS.items():
            row = scores[way]["R@5"]
            title = f"retrieval R@5, {words}, {pool}, {scores['candidates']} candidates (chance {row['chance']:.3f})"
            reached = target(row["times_chance"], TIMES_CHANCE, "{:g} x chance")
            rows.append([title, str(scores["n"]), cell(row), *[""] * (width - 4), reached])
    return rows


def about(result: Mapping[str, Any]) -> str:
    """What was measured, on whom, and by which command."""
    chance = result["metrics"].get("vqa/mean", {}).get("chance")
    unread = result["metrics"].get("vqa/mean", {}).get("unparsable")
    closed = f"; chance in closed VQA is {chance:.2f}, {unread:.0%} of its answers choose nothing" if chance else ""
    return (
        f"`{result['model']}` ({result['parameters'] / 1e6:.1f} M parameters) on {result['patients']} OpenKBP "
        f"validation patients, {result['seconds'] / 60:.0f} minutes (`{result['command']}`){closed}."
    )


def about_reference(result: Mapping[str, Any]) -> str:
    """How the SegResNet came to be."""
    return (
        f"{result['model']} ({result['parameters'] / 1e6:.1f} M parameters), masks only, trained for "
        f"{result['seconds'] / 60:.0f} minutes on the same stores (`{result['command']}`): an upper reference."
    )


def structures() -> str:
    """Masks and boxes of each structure."""
    reference = there(REFERENCE)
    parts = []
    for model, result in accuracies().items():
        metrics = result["metrics"]
        names = groups_of(metrics, "dice") or groups_of(metrics, "iou")
        parts += [
            f"`{model}`, masks by name; the blind twin sees every voxel zero:",
            by_name(metrics, reference, names),
        ]
        ways = {"click": "one click", "box": "box", "name+click": "name and click", "name+box": "name and box"}
        if prompted := {way: title for way, title in ways.items() if groups_of(metrics, way)}:
            cells = [[name, *(cell(metrics.get(f"{way}/{name}")) for way in prompted)] for name in names]
            parts += [f"`{model}`, Dice by what is pointed at:", markdown(["", *prompted.values()], cells)]
        if groups_of(metrics, "iou") or groups_of(metrics, "reg"):
            cells = [[name, *twins(metrics, f"iou/{name}"), *twins(metrics, f"reg/{name}")] for name in names]
            heads = ["", "box IoU", "blind", "named in its box", "blind"]
            parts += [f"`{model}`, boxes; a structure can be known by its box's place alone:", markdown(heads, cells)]
    return "\n\n".join(parts)


def by_name(metrics: Metrics, reference: Mapping[str, Any] | None, names: Sequence[str]) -> str:
    """Dice and surface Dice of each structure, and the SegResNet's."""
    measures = {"dice": "Dice", "nsd": "surface Dice at 3 mm"}
    heads = ["", "n", *measures.values(), "Dice, blind"]
    heads += [f"{title}, SegResNet" for title in measures.values()] if reference else []
    rows = []
    for name in names:
        own = metrics.get(f"dice/{name}")
        cells = [cell(metrics.get(f"{measure}/{name}")) for measure in measures] + [cell(own, "blind")]
        cells += [cell(reference["metrics"].get(f"{measure}/{name}")) for measure in measures] if reference else []
        rows.append([name, str(own["n"]) if own else "-", *cells])
    return markdown(heads, rows)


def twins(metrics: Metrics, metric: str) -> list[str]:
    """A value and that of the blind twin."""
    return [cell(metrics.get(metric)), cell(metrics.get(metric), "blind")]


def groups_of(metrics: Metrics, measure: str) -> list[str]:
    """The structures or families of a measure, and what stands for all of them."""
    names = [name.partition("/")[2] for name in metrics if name.startswith(f"{measure}/")]
    return [name for name in names if name != "gain"]


def questions() -> str:
    """Closed and open questions by family."""
    parts = []
    for model, result in accuracies().items():
        metrics = result["metrics"]
        rows = []
        for name in groups_of(metrics, "vqa"):
            closed = metrics[f"vqa/{name}"]
            gain = cell(closed, "gain")
            opened = [*twins(metrics, f"open/{name}"), *twins(metrics, f"within20/{name}")]
            rows.append(
                [name, str(closed["n"]), f"{closed['chance']:.2f}", cell(closed), cell(closed, "blind"), gain, *opened]
            )
        heads = [
            "family",
            "n",
            "chance",
            "closed",
            "blind",
            "gain",
            "open, exact",
            "blind",
            "open, within 20 %",
            "blind",
        ]
        parts += [f"`{model}`:", markdown(heads, rows)] if rows else []
    return "\n\n".join(parts) or "Not measured yet."


def retrieval() -> str:
    """Both directions of every pool, with chance."""
    result = read("retrieval_tiny.json")
    names = ("R@1", "R@5", "R@10", "MRR")
    rows = []
    for pool, found in result["pools"].items():
        for way, words in WAYS.items():
            row = found[way]
            cells = [f"{cell(row[name])}, chance {row[name]['chance']:.3f}" for name in names]
            rows.append([pool, f"{found['n']} of {found['candidates']}", words, *cells, f"{row['median_rank']:g}"])
    told = f"Each pool by itself, split {result['split']}, texts of `{result['task']}` (`{result['command']}`)."
    stage = there("training_clip.json")
    if stage is not None:
        points = ", ".join(f"step {row['step']} {row['R@5']:.3f}" for row in stage["evaluations"])
        chance = stage["evaluations"][-1]["chance_R@5"]
        told += f" R@5 among all judged scans while it learned: {points} (chance {chance:.3f})."
    return "\n".join([markdown(["pool", "asked for", "direction", *names, "median rank"], rows), "", told])


def parity() -> str:
    """Largest absolute difference to the reference on each fixture."""
    rows = read("parity.json")["max_abs_error"]
    return "\n".join(
        ["| fixture | values compared | largest absolute error |", "|---|---|---|"]
        + [f"| {name} | {row['values']:,} | {row['error']:.1e} |" for name, row in rows.items()]
    )


def formats() -> str:
    """Bytes and read times of every format and kind of number."""
    result = read("store_formats.json")
    kinds = result["formats"]
    names = sorted(kinds["uint8 [0,1]"], key=lambda name: kinds["uint8 [0,1]"][name]["read_ms"])
    lines = ["| MiB / read ms | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name in names:
        cells = [f"{kinds[kind][name]['mib']:.2f} / {kinds[kind][name]['read_ms']:.2f}" for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    against, worst = result["against float32 npy"], result["largest error of uint8 in a 600 HU window, HU"]
    return "\n".join(
        [
            *lines,
            "",
            f"uint8 `.npy` against the reference's float32 `.npy`: {against['bytes']:.1f} times fewer bytes, read "
            f"{against['read time']:.1f} times faster; its largest error in a 600 HU window is {worst:.2f} HU.",
        ]
    )


def families() -> str:
    """How far each family of derived questions can be answered blind."""
    result = read("derived_questions.json")
    lines = ["| family | n | chance | most frequent answer | usual answer to the question |", "|---|---|---|---|---|"]
    for name, row in result["families"].items():
        lines.append(f"| {name} | {row['n']} | {row['chance']:.2f} | {row['majority']:.2f} | {row['usual']:.2f} |")
    said = ", ".join(f"{some} of {whole} {task} texts" for task, (some, whole) in result["distinct texts"].items())
    return "\n".join([*lines, "", f"{result['patients']} patients (`{result['command']}`); distinct: {said}."])


def packing() -> str:
    """Exchanges a second: each with its own look at the volume, sharing one, and packed into a row."""
    result = read("packing.json")
    lines = ["| model | losses | apart | volume shared | packed | packed / apart |", "|---|---|---|---|---|---|"]
    for size, row in result["sizes"].items():
        for losses in ("words and masks", "words alone"):
            rate, gain = row[losses]["exchanges a second"], row[losses]["packed / apart"]
            cells = " | ".join(f"{rate[way]:.2f}" for way in ("apart", "shared", "packed"))
            lines.append(f"| {size} ({row['parameters'] / 1e6:.0f} M) | {losses} | {cells} | {gain:.1f} |")
    return "\n".join([*lines, "", f"Exchanges a second, {result['machine'].strip(', ')}."])


def stages() -> str:
    """The stages of every model: how long each took, and what it measured before and after."""
    found = [read(f"training_{MODELS[0]}.json"), *(there(f"training_{model}.json") for model in MODELS[1:])]
    return "\n\n".join(stages_of(result) for result in found if result is not None)


def stages_of(result: Mapping[str, Any]) -> str:
    """Those of one model."""
    rows = []
    for stage in result["stages"]:
        judged = stage["evaluations"]
        told = ""
        if judged:
            names = [name for name in judged[0] if name not in ("step", "loss", "token_spread")] or ["loss"]
            told = ", ".join(f"{name} {judged[0][name]:.3f} to {judged[-1][name]:.3f}" for name in names)
            told += f" (steps {judged[0]['step']} to {judged[-1]['step']})" if len(judged) > 1 else ""
        minutes = f"{stage['wall_seconds'] / 60:.0f}"
        rows.append([stage["name"], str(stage["steps"]), str(stage["batch"]), minutes, told])
    machine = result["machine"]
    where = machine["gpu"] or f"{machine['cores']} CPU cores"
    heads = ["stage", "steps", "volumes a step", "minutes", "losses on scans not learned from"]
    told = f"`{result['model']}`: `{result['command']}` on {where}; minutes include what else the machine did."
    return f"{markdown(heads, rows)}\n\n{told}"


def clicks() -> str:
    """Dice of the five structures after so many simulated clicks, and how many clicks it takes to reach 0.8."""
    result = read("clicks.json")
    counts, rows = (0, 1, 3, 5, 10), []
    for way in result["ways"]:
        found = {name: result["metrics"].get(f"{way}: {name}/five") for name in ("noc80", "never80")}
        each = [result["metrics"].get(f"{way}: dice@{count}/five") for count in counts]
        speed = result["milliseconds a click"][way]["median"]
        rows.append([way, *map(cell, each), *map(cell, found.values()), f"{speed:.0f}"])
    heads = ["way", *map(str, counts), "clicks to 0.8, at most 10", "share that never is", "ms a click"]
    return f"{markdown(heads, rows)}\n\n{result['patients']} patients, one thread (`{result['command']}`)."


# -- segmentation -----------------------------------------------------------------------------------------------------


def zoom() -> str:
    """Dice and surface Dice with zooming in, without it, and the difference, by way and zoom."""
    result, rows = read("zoom.json"), []
    metrics = result["metrics"]
    for way in ("name", "click", "box"):
        for how in result["zooms"]:
            each = [metrics.get(f"{way}: {measure}, {how}/mean") for measure in ("dice", "nsd")]
            cells = [cell(row, key) for row in each for key in ("without", "value", "gain")]
            rows.append([way, how, *cells])
    heads = [
        "prompt",
        "zoom",
        *(f"{name}{what}" for name in ("Dice", "surface Dice") for what in ("", ", zoom", ", gain")),
    ]
    spent = ", ".join(f"{zoom} {seconds:.1f} s" for zoom, seconds in result["seconds a mask"].items())
    told = f"{result['model']}, {result['patients']} validation patients of OpenKBP, all structures, surface Dice at "
    told += f"{result['tolerance_mm']:g} mm; a mask takes {spent} with {result['machine']['threads']} thread(s) "
    told += f"(`{result['command']}`)."
    return f"{markdown(heads, rows)}\n\n{told}"


def zoom_structures() -> str:
    """Gain in Dice of each structure, by way, at the finest zoom."""
    result = read("zoom.json")
    how, metrics = result["zooms"][-1], result["metrics"]
    ways = ("name", "click", "box")
    names = [key.rpartition("/")[2] for key in metrics if key.startswith(f"box: dice, {how}/")]
    rows = []
    for name in names:
        each = [metrics.get(f"{way}: {measure}, {how}/{name}") for way in ways for measure in ("dice", "nsd")]
        pairs = [f"{cell_of(row, 'without')} → {cell_of(row, 'value')}" for row in each]
        rows.append([name, *pairs])
    heads = ["structure", *(f"{way}, {measure}" for way in ways for measure in ("Dice", "surface Dice"))]
    return markdown(heads, rows)


def cell_of(row: Mapping[str, Any] | None, key: str) -> str:
    """A value without its interval."""
    return "-" if row is None or row.get(key) is None else f"{row[key]:.2f}"


def large_volume() -> str:
    """Seconds and peak memory of the command on a large scan."""
    result, rows = read("large_volume.json"), []
    for row in result["rows"]:
        voxel = (
            "the model's grid" if row["drawn_at_mm"] is None else " x ".join(f"{mm:.1f}" for mm in row["drawn_at_mm"])
        )
        numbers = [
            f"{row['seconds']:.0f}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['peak_mb'] / 1000:.1f}",
            f"{row['dice']:.2f}",
        ]
        rows.append([row["way"], row["zoom"], voxel, *numbers])
    heads = ["prompt", "zoom", "drawn at, mm", "seconds", "CPU seconds", "peak GB", "Dice"]
    scan, machine = result["scan"], result["machine"]
    told = f"{' x '.join(map(str, scan['shape']))} voxels of {' x '.join(map(str, scan['spacing_mm']))} mm, a "
    told += f"{scan['file_bytes'] / 1e6:.0f} MB int16 NIfTI; the {result['structure']} of phantom {scan['phantom']}, "
    told += f"by {result['model']} on {machine['cores']} cores (`{result['command']}`)."
    return f"{markdown(heads, rows)}\n\n{told}"


def presence() -> str:
    """How the calibrated presence does on every set that it is judged on."""
    result = read("presence.json")
    rows = []
    for what, found in result["sets"].items():
        counts = [str(found[key]) for key in ("patients", "there", "not there")]
        shares = [cell(found[key]) for key in ("auc", "brier", "there, called there", "not there, called not there")]
        rows.append([what, *counts, *shares, f"{found['ece']:.3f}"])
    heads = ["scans", "patients", "there", "not there", "AUC", "Brier score", "called there, of those that are"]
    heads += ["called not there, of those that are not", "ECE"]
    return f"{markdown(heads, rows)}\n\n`{result['model']}`, 95 % CI by patient (`{result['command']}`)."


def presence_structures() -> str:
    """By structure: how many are called there, and how many not, on phantoms and on patients."""
    sets = read("presence.json")["sets"]
    shown = [what for what in ("phantoms", "patients", "cut patients", "strangers") if what in sets]
    names = list(dict.fromkeys(name for what in shown for name in sets[what]["structures"]))
    rows = [[name, *(_called(sets[what]["structures"].get(name)) for what in shown)] for name in names]
    told = "Called there of those that are; called not there of those that are not."
    return f"{markdown(['structure', *shown], rows)}\n\n{told}"


def _called(row: Mapping[str, int] | None) -> str:
    if row is None:
        return "-"
    kinds = [kind for kind in ("there", "not there") if row[kind]]
    return "; ".join(f"{row[f'of these called {kind}']} of {row[kind]}" for kind in kinds)


# -- M3D-Bench --------------------------------------------------------------------------------------------------------


def bench() -> str:
    """The bundled model on all validation patients, every metric of the standard protocol."""
    return bench_table([read(f"bench_{MODELS[0]}.json")])


def bench_released() -> str:
    """The same answers, counted as the released evaluation counts."""
    return bench_table([read(f"bench_{MODELS[0]}.m3d.json")])


def bench_retrieval() -> str:
    """The pair of towers that begins from the bundled model's, on all validation patients."""
    return bench_table([read("bench_retrieval.json")])


def published() -> str:
    """What papers state, as it stands beside runs of the same task and metric."""
    rows = [
        [one.task, one.metric, one.model, f"{one.value:.4f}", one.protocol, f"{one.data}, {one.note}",
         f"{one.paper}, {one.where}"]
        for one in published_numbers()
    ]  # fmt: skip
    heads = ["task", "metric", "model", "value", "protocol", "data", "source"]
    unread = [f"{system}: none could be read ({why})." for system, why in unread_systems().items()]
    return "\n\n".join([markdown(heads, rows), *unread])


def side_by_side() -> str:
    """Both models on the same few patients, the telling metrics of every task."""
    return bench_table([read(f"bench_few_{model}.json") for model in MODELS], TELLING)


def bench_table(runs: Sequence[Mapping[str, Any]], metrics: Sequence[str] = ()) -> str:
    """The table of scored runs, or of some metrics, without published numbers of other data, and what the runs are."""
    found = sheet(runs)
    rows = [row for row in found.rows if row.footnote is None and (not metrics or row.metric in metrics)]
    own = replace(found, rows=tuple(rows))
    patients = max(entry["patients"] for run in runs for entry in run["tasks"].values())
    facts = found.runs[0]
    how = f"protocol {facts['protocol']}; grid: {facts['grid']}; 95 % CI by patient"
    about = f"{facts['data']}, {patients} patients; {how}."
    return "\n".join([*markdown_table(own.columns()), "", about])


def bench_prompts() -> str:
    """Masks by every kind of prompt; of all patients or, where that has not been measured, of a few."""
    result = there(f"bench_prompts_{MODELS[0]}.json")
    found = result or read(f"bench_prompts_few_{MODELS[0]}.json")
    heads = ["asked by", "n", "Dice", "blind", "NSD@3mm", "given mask", *(f"Dice@{n}" for n in CLICKS), "NoC@80"]
    rows = []
    for name, task in found["tasks"].items():
        metrics = task["metrics"]
        after = [f"Dice after {n} click{'s' * (n > 1)}" for n in CLICKS]
        alone = ["NSD@3mm", "Dice of the given mask", *after]
        values = [cell({"value": metrics[metric]["value"]}) if metric in metrics else "-" for metric in alone]
        clicks = metrics.get("NoC@80")
        reached = "-" if clicks is None else f"{clicks['value']:.1f} ({metrics['never Dice 0.8']['value']:.0%} never)"
        dice = metrics["Dice"]
        twin = cell({"value": dice.get("blind")})
        rows.append([name.replace("_", "\\_"), str(task["n"]), cell(dice), twin, *values, reached])
    patients = max(task["patients"] for task in found["tasks"].values())
    said = "" if result else " **An example, not a result**: so few patients tell no kind from another."
    told = f"{patients} patients, 95 % CI by patient; `{found['model']['id']}` (`{found['command']}`).{said}"
    return f"{markdown(heads, rows)}\n\n{told}"


def bench_speed() -> str:
    """Answers a second, beside the released way of asking."""
    result = read("bench_speed.json")
    rates = {way: statistics.median(some) for way, some in result["answers a second"].items()}
    ratio = result["together / apart"]
    rows = [
        ["one at a time, the scan encoded for each", f"{rates['apart']:.2f}"],
        [f"`m3d bench run`, batches of {result['batch']}", f"{rates['together']:.2f}"],
        ["ratio, median of rounds", f"{ratio['median']:.1f}"],
    ]
    told = f"{result['answers']} answers about {result['scans']} scans, {result['rounds']} rounds of both in turn"
    told += f" (`{result['command']}`); {result['answers alike']} of {result['answers']} are word for word the same."
    return f"{markdown(['way of asking', 'answers a second'], rows)}\n\n{told}"


def finetune() -> str:
    """Dice on patients that were held out, before and after fine-tuning on a folder of others."""
    result, rows = read("finetune.json"), []
    before, after = result["before"], result["after"]
    for name, now in {**after["structures"], "mean": after["mean"]}.items():
        was = before["structures"].get(name, before["mean"])
        each = [f"{was[by]:.2f} → {now[by]:.2f}" for by in ("name", "click", "box")]
        rows.append([name, str(now.get("n", "")), *each])
    told = f"{result['checkpoint']}, {result['steps']} steps in {result['seconds'] / 60:.0f} minutes on "
    told += f"{result['machine']['threads']} thread(s) of a busy machine; {result['patients']} patients of OpenKBP's "
    told += "validation split, "
    told += f"{result['held_out']} of them held out (`{result['command']}`)."
    return f"{markdown(['structure', 'n', 'by name', 'by a click', 'by a box'], rows)}\n\n{told}"


def export_bundle() -> str:
    """What a MONAI bundle draws beside the model it was made of."""
    result = read("export_bundle.json")
    model = str(result["model"])
    heads = [
        "asked by",
        "masks",
        f"{model}, Dice of five",
        "bundle, Dice of five",
        "Dice of the two masks",
        "lowest",
        "equal",
    ]
    rows = [
        [
            kind,
            str(row["n"]),
            f"{row['model, mean of five']:.3f}",
            f"{row['bundle, mean of five']:.3f}",
            f"{row['agreement, mean']:.3f}",
            f"{row['agreement, lowest']:.3f}",
            f"{row['equal']} of {row['n']}",
        ]
        for kind, row in result["metrics"].items()
    ]
    return f"{markdown(heads, rows)}\n\n{result['patients']} OpenKBP validation patients (`{result['command']}`)."


def convert_memory() -> str:
    """What a conversion of the released size takes, by how many files it is read from."""
    results = [read("convert_memory.json"), there("convert_memory_float32.json")]
    heads = ["read as", "files", "GB", "written as", "files", "GB"]
    heads += ["peak memory, GB", "without mapped files, GB", "minutes"]
    rows = [
        [
            result["stored"],
            str(row["shards"]),
            f"{row['bytes_read'] / 1e9:.2f}",
            result["stored"] if result["dtype"] == "keep" else result["dtype"],
            str(row["files_written"]),
            f"{row['bytes_written'] / 1e9:.2f}",
            f"{row['peak_rss'] / 1e9:.2f}",
            f"{row['peak_anonymous'] / 1e9:.2f}",
            f"{row['seconds'] / 60:.1f}",
        ]
        for result in results
        if result is not None
        for row in result["runs"]
    ]
    before = max(row["before"] for result in results if result is not None for row in result["runs"]) / 1e9
    commands = "; ".join(f"`{result['command']}`" for result in results if result is not None)
    told = (
        f"Names and shapes of M3D-LaMed-Llama-2-7B, random weights ({commands}). {before:.2f} GB are in memory before "
        "anything is read; mapped pages may be dropped at any time."
    )
    return f"{markdown(heads, rows)}\n\n{told}"


BLOCKS = {
    "finetune": finetune,
    "zoom": zoom,
    "zoom_structures": zoom_structures,
    "large_volume": large_volume,
    "clicks": clicks,
    "presence": presence,
    "presence_structures": presence_structures,
    "bench": bench,
    "bench_released": bench_released,
    "bench_retrieval": bench_retrieval,
    "published": published,
    "bench_prompts": bench_prompts,
    "side_by_side": side_by_side,
    "bench_speed": bench_speed,
    "stages": stages,
    "accuracy": accuracy,
    "structures": structures,
    "questions": questions,
    "retrieval": retrieval,
    "parity": parity,
    "formats": formats,
    "families": families,
    "packing": packing,
    "export_bundle": export_bundle,
    "convert_memory": convert_memory,
}


def rewrite(text: str) -> str:
    """Put each table between its markers, or what is missing for it."""
    for name, table in BLOCKS.items():
        block = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        if block.search(text):
            _weights_read.clear()
            try:
                told = table()
                if age := told_age(_weights_read):
                    told += f"\n\n{age}"
            except FileNotFoundError as error:
                told = f"Not measured yet: `benchmarks/results/{Path(str(error.filename)).name}` is not there."
                print(f"{name}: {told}")
            new = f"<!-- {name} -->\n{told}\n<!-- /{name} -->"
            text = block.sub(new.replace("\\", r"\\"), text)
    return text


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(rewrite(document.read_text(encoding="utf-8")), encoding="utf-8")
