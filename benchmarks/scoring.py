"""From what was answered to a table: values, blind twins beside them, and how sure one may be of either.

A row is one answer: ``patient``, ``sight`` ("seeing" or "blind"), ``task``, ``item``, and what was said or drawn.
Tables are made of rows alone, so that a number can be counted anew without asking the model again.

Intervals are of 95 %, from a bootstrap over patients: the questions about one scan are not independent of each other.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import m3d  # noqa: F401  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import numpy as np
import numpy.typing as npt

from m3d.bench.bootstrap import drawn
from m3d.bench.metrics.answers import NUMBER, number_in
from m3d.bench.metrics.masks import NSD, Dice, MaskPair
from m3d.tasks import TASKS
from m3d.tasks.codecs import Frac3
from m3d.train.pairs import sentences_of

TOLERANCE_MM = 3.0
WITHIN = 0.2
FIVE = ("brainstem", "spinal cord", "left parotid", "right parotid", "mandible")
DRAWN = ("dice", "click", "box", "name+click", "name+box")  # by name, and by what a user points at
BY_STRUCTURE = (*DRAWN, "nsd", "iou")  # where a summary is the mean over structures

Mask = npt.NDArray[np.bool_]
Row = Mapping[str, Any]
Values = dict[str, list[float]]  # of one structure or family: patient -> one value an item
Statistic = Callable[[Sequence[Values], Sequence[str], npt.NDArray[np.int64]], npt.NDArray[np.float64]]


# -- masks ----------------------------------------------------------------------------------------------------------


def mask_row(guess: Mask | None, truth: Mask, spacing: Sequence[float]) -> dict[str, Any]:
    """The part of a row that tells of a mask; None is a refusal to draw, and counts 0."""
    if guess is None:
        return {"dice": 0.0, "nsd": 0.0, "drawn": False}
    d, h, w = spacing
    pair = MaskPair("", guess, truth, (d, h, w))
    return {"dice": Dice().value(pair), "nsd": NSD(TOLERANCE_MM).value(pair), "drawn": True}


# -- words ----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(NUMBER)


def plain(text: str) -> str:
    """Words alone, in small letters; numbers keep sign and point."""
    return " ".join(re.findall(r"-?\d+(?:\.\d+)?|\w+", text.lower()))


def relative_error(said: float | None, truth: float) -> float:
    """How far off, as a share of the truth (or of 1, where that is less); infinite where none was said."""
    return float("inf") if said is None else abs(said - truth) / max(abs(truth), 1.0)


def facts_in(text: str) -> list[tuple[str, tuple[float, ...]]]:
    """Each sentence of a report as its words and its numbers."""
    return [
        (_NUMBER.sub("#", sentence.lower()).strip(" ."), tuple(map(float, _NUMBER.findall(sentence))))
        for sentence in sentences_of(text)
    ]


def facts_right(said: str, truth: str) -> tuple[list[float], list[float]]:
    """Of each true sentence whether it was said, and of each said one whether it is true, numbers within 20 %."""
    told, true = facts_in(said), facts_in(truth)

    def agree(one: tuple[str, tuple[float, ...]], other: tuple[str, tuple[float, ...]]) -> bool:
        pairs = zip(one[1], other[1], strict=False)  # where words agree, so does how many numbers they have
        return one[0] == other[0] and all(relative_error(a, b) <= WITHIN for a, b in pairs)

    found = [float(any(agree(one, other) for one in told)) for other in true]
    right = [float(any(agree(one, other) for other in true)) for one in told]
    return found, right


# -- one row ----------------------------------------------------------------------------------------------------------


def chosen(row: Row) -> int | None:
    """Which option a closed question's answer names, if it names one."""
    found: int | None = TASKS["vqa.closed"].parse(row["text"], Frac3(), options=row["options"])  # type: ignore[call-arg]
    return found


def named(row: Row) -> str:
    """The structure that the answer to "what is in this box" names."""
    return plain(TASKS["reg"].parse(row["text"], Frac3())).removeprefix("the ")


def values_of(row: Row) -> dict[str, list[float]]:
    """What a row says for each measure, ``measure/group`` -> values."""
    task, item = str(row["task"]), str(row["item"])
    family = item.partition("/")[0]
    if task in DRAWN:
        surface = {f"nsd/{item}": [row["nsd"]]} if task == "dice" else {}
        return {f"{task}/{item}": [row["dice"]], **surface}
    if task == "iou":
        return {f"iou/{item}": [row["iou"]]}
    if task == "vqa.closed":
        return {f"vqa/{family}": [float(chosen(row) == row["choice"])]}
    if task == "vqa.open":
        exact = {f"open/{family}": [float(plain(row["text"]) == plain(row["truth"]))]}
        if row.get("value") is None:
            return exact
        error = relative_error(number_in(row["text"], row["unit"]), row["value"])
        return exact | {f"within20/{family}": [float(error <= WITHIN)], f"error/{family}": [error]}
    if task == "reg":
        return {f"reg/{item}": [float(named(row) == plain(item))]}
    if task == "report":
        said, right = facts_right(row["text"], row["truth"])
        return {"report/recall": said, "report/precision": right}
    return {}


# -- how sure ---------------------------------------------------------------------------------------------------------


def mean_of_means(
    groups: Sequence[Values], patients: Sequence[str], weights: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """The mean over groups of the mean over items, for each row of weights; a group without a patient is left out."""
    means = []
    for group in groups:
        totals = np.array([sum(group.get(patient, ())) for patient in patients])
        counts = np.array([len(group.get(patient, ())) for patient in patients])
        with np.errstate(invalid="ignore"):
            means.append(weights @ totals / (weights @ counts))
    return np.asarray(np.nanmean(means, axis=0))


def median(
    groups: Sequence[Values], patients: Sequence[str], weights: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """The median of all items, for each row of weights."""
    pairs = [(v, i) for group in groups for i, patient in enumerate(patients) for v in group.get(patient, ())]
    order = sorted(pairs)
    values = np.array([value for value, _ in order])
    count = weights[:, [owner for _, owner in order]].cumsum(axis=1)
    total = count[:, -1:]
    low, high = ((count > place).argmax(axis=1) for place in ((total - 1) // 2, total // 2))
    return np.asarray((values[low] + values[high]) / 2)


def interval(draws: npt.NDArray[np.float64], prefix: str = "") -> dict[str, float | None]:
    """The middle 95 % of what the resamples gave, as ``low`` and ``high``."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return {f"{prefix}low": finite(low), f"{prefix}high": finite(high)}


def finite(value: Any) -> float | None:
    """A number as JSON can hold it."""
    return float(value) if np.isfinite(value) else None


def measured(
    seeing: Sequence[Values], blind: Sequence[Values] = (), statistic: Statistic = mean_of_means
) -> dict[str, Any]:
    """Value, blind twin and the difference of the two, each with its interval; the twins share their resamples."""
    patients = sorted({patient for group in seeing for patient in group})
    weights, once = drawn(len(patients)), np.ones((1, len(patients)), np.int64)
    row: dict[str, Any] = {"n": sum(len(v) for group in seeing for v in group.values()), "patients": len(patients)}
    with np.errstate(invalid="ignore"):  # a median may be infinite, where most answers hold no number
        value, draws = statistic(seeing, patients, once), statistic(seeing, patients, weights)
        row |= {"value": finite(value[0]), **interval(draws)}
        if blind:
            other, others = statistic(blind, patients, once), statistic(blind, patients, weights)
            row |= {"blind": finite(other[0]), **interval(others, "blind_")}
            row |= {"gain": finite((value - other)[0]), **interval(draws - others, "gain_")}
    return row


# -- the table --------------------------------------------------------------------------------------------------------


def collected(rows: Iterable[Row], sight: str) -> dict[str, dict[str, Values]]:
    """Values by measure, group and patient."""
    found: dict[str, dict[str, Values]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        if row["sight"] == sight:
            for name, values in values_of(row).items():
                measure, _, group = name.partition("/")
                found[measure][group][row["patient"]] += values
    return found


def score(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The table of rows: every ``measure/group``, and the summary rows ``/five`` and ``/mean``."""
    seeing, blind = collected(rows, "seeing"), collected(rows, "blind")
    table: dict[str, dict[str, Any]] = {}
    for measure, groups in seeing.items():
        statistic = median if measure == "error" else mean_of_means
        others = blind.get(measure, {})
        for group in sorted(groups):
            table[f"{measure}/{group}"] = measured([groups[group]], [others[group]] if others else (), statistic)
        for name, chosen_groups in summaries(measure, groups).items():
            twins = summaries(measure, others)[name] if others else ()
            table[f"{measure}/{name}"] = measured(chosen_groups, twins, statistic)
    return with_choices(table, rows)


def summaries(measure: str, groups: Mapping[str, Values]) -> dict[str, list[Values]]:
    """What stands for a measure as a whole: groups whose means are averaged, or all items in one."""
    if measure in BY_STRUCTURE:
        five = [groups[name] for name in FIVE if name in groups]
        return ({"five": five} if five else {}) | {"mean": list(groups.values())}
    if measure == "report":
        return {}
    return {"median" if measure == "error" else "mean": [pooled(groups.values())]}


def pooled(groups: Iterable[Values]) -> Values:
    """All items as one group."""
    found: Values = defaultdict(list)
    for group in groups:
        for patient, values in group.items():
            found[patient] += values
    return found


def with_choices(table: dict[str, dict[str, Any]], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Add chance and the share of answers that choose nothing to closed questions, and their gain as a row."""
    closed = [row for row in rows if row["task"] == "vqa.closed"]
    families = {str(row["item"]).partition("/")[0] for row in closed}
    for family in (*sorted(families), "mean") if closed else ():
        own = [row for row in closed if family in ("mean", str(row["item"]).partition("/")[0])]
        entry = table[f"vqa/{family}"]
        entry["chance"] = statistics.fmean(1 / len(row["options"]) for row in own)
        for sight, name in (("seeing", "unparsable"), ("blind", "blind_unparsable")):
            read = [chosen(row) is None for row in own if row["sight"] == sight]
            if read:
                entry[name] = statistics.fmean(read)
    total = table.get("vqa/mean", {})
    if "gain" in total:
        gain = {"value": total["gain"], "low": total["gain_low"], "high": total["gain_high"]}
        table["vqa/gain"] = {"n": total["n"], "patients": total["patients"], **gain}
    return table
