"""A page that a person opens from disk: the metrics, and each task's best, median and worst samples with pictures.

The page is one folder: ``index.html``, which needs no network and runs no script, and the pictures beside it. What a
model said is text in it and never markup.
"""

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.atomic import atomic_path
from data_prep.volume import Volume
from m3d.bench.metrics.base import Metric
from m3d.bench.scored import (
    PREDICTIONS,
    MetricsOf,
    facts_of,
    known_metrics,
    question_of,
    read_lines,
    read_metrics,
    read_samples,
    registered,
    statistics_of,
)
from m3d.bench.table import Sheet, number, sheet
from m3d.inference.planes import NOTICE, Finding
from m3d.inference.results import slug

__all__ = ["PAGE", "Drawn", "Picture", "Shown", "choose", "write_page"]

PAGE, INDEX = "page", "index.html"
Drawn = tuple[Volume, Sequence[Finding], Sequence[Finding]]  # the scan, what is true, what was answered
Picture = Callable[[Mapping[str, Any]], Drawn | None]  # of a line of samples.jsonl
POLICY = "script-src 'none'; object-src 'none'; base-uri 'none'"  # a second lock: all text is escaped already
STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; --bad: #b3261e; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1.2rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr.published { color: var(--quiet); font-style: italic; } .quiet { color: var(--quiet); font-size: .88rem; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem 1.1rem 1rem; margin: 1.2rem 0; }
dl { display: grid; grid-template-columns: 6rem 1fr; gap: .35rem 1rem; margin: .6rem 0; } dt { color: var(--quiet); }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; }
.failure { color: var(--bad); } img { max-width: 100%; height: auto; border-radius: .4rem; }
"""


@dataclass(frozen=True)
class Shown:
    """A sample that is shown: ``rank`` is best, median or worst by ``metric``, whose value of it alone is ``value``."""

    rank: str
    metric: str
    unit: str
    value: float
    sample: Mapping[str, Any]


def write_page(folder: Path, picture: Picture | None = None, *, metrics_of: MetricsOf = registered) -> Path:
    """Write ``page/`` of a scored run, whole or not at all, in the place of an earlier one; the path of its index.

    ``picture`` gives what to draw of a sample, or None; without it the page has no pictures.

    Raises:
        FileNotFoundError: The run was not scored.
        FileExistsError: ``page`` is something that this did not write.
    """
    metrics, samples = read_metrics(folder), list(read_samples(folder).values())
    page = folder / PAGE
    if page.exists() and not (page / INDEX).is_file():
        raise FileExistsError(f"{page} exists and is no page of a run; move it away")
    shown = {}
    for task, found in metrics["tasks"].items():
        of_task = [sample for sample in samples if sample["task"] == task]
        names = list(found.get("metrics", {}))
        shown[task] = choose(of_task, names, known_metrics(task, str(metrics["protocol"]), names, metrics_of))
    prompts = _prompts(folder, {question_of(one.sample) for some in shown.values() for one in some})
    with _in_place_of(page) as fresh:
        fresh.mkdir()
        sections = [_section(task, metrics["tasks"][task], shown[task], prompts, fresh, picture) for task in shown]
        (fresh / INDEX).write_text(_document(metrics, sections), encoding="utf-8")
    return page / INDEX


def choose(samples: Sequence[Mapping[str, Any]], names: Sequence[str], known: Mapping[str, Metric]) -> list[Shown]:
    """The best, the median and the worst sample by the first metric that is known and judges any; ties go by id."""
    for metric in (known[name] for name in names if name in known):
        rows = statistics_of(samples, metric.name)
        values = [float(metric.reduce(row[None], np.ones(1))[0]) for row in rows]
        judged = [(value, sample) for value, sample in zip(values, samples, strict=True) if np.isfinite(value)]
        if judged:
            sign = -1 if metric.better == "higher" else 1
            ordered = sorted(judged, key=lambda pair: (sign * pair[0], str(pair[1]["id"])))
            places = {len(ordered) // 2: "median", len(ordered) - 1: "worst", 0: "best"}  # one sample alone is the best
            return [Shown(rank, metric.name, metric.unit, *ordered[at]) for at, rank in sorted(places.items())]
    return []


def _prompts(folder: Path, wanted: set[str]) -> dict[str, str]:
    """What was asked, by question, for those that are shown."""
    lines = ((question_of(line), line) for _, line in read_lines(folder, PREDICTIONS))
    return {question: str(line.get("prompt") or "") for question, line in lines if question in wanted}


def _section(
    task: str,
    found: Mapping[str, Any],
    shown: Sequence[Shown],
    prompts: Mapping[str, str],
    folder: Path,
    picture: Picture | None,
) -> str:
    """A task's heading, its failures, and its samples, whose pictures are drawn into ``folder``."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in (found.get("failures") or {}).items())
    failed = f"{found.get('n_failed') or 0} failed" + (f" ({kinds})" if kinds else "")
    told = f"{found.get('n')} samples of {found.get('patients')} patients, {failed}."
    if shown:
        told += f" The best, the median and the worst by {shown[0].metric}, of each sample alone."
    else:
        told += " No sample has a value of its own, so none is shown."
    cards = [_card(one, prompts.get(question_of(one.sample), ""), _draw(task, one, folder, picture)) for one in shown]
    return "\n".join([f"<section><h2>{_text(task)}</h2>", f'<p class="quiet">{_text(told)}</p>', *cards, "</section>"])


def _draw(task: str, one: Shown, folder: Path, picture: Picture | None) -> str | None:
    """The name of a sample's picture, drawn with what is true first, then what was answered; None without one."""
    drawn = picture(one.sample) if picture is not None else None
    if drawn is None:
        return None
    from m3d.inference.overlay import save_overlay

    volume, truth, guess = drawn
    findings = [
        replace(finding, name=_unmarked(f"{finding.name}, {which}"))
        for which, some in (("truth", truth), ("answer", guess))
        for finding in some
        if finding.visible
    ]
    name = f"{slug(task)}_{one.rank}.png"
    notes = [] if any(finding.visible for finding in guess) else ["The answer has nothing to draw."]
    save_overlay(folder / name, volume, findings, title=_unmarked(f"{task}   {one.sample['id']}"), notes=notes)
    return name


def _card(one: Shown, prompt: str, picture: str | None) -> str:
    sample = one.sample
    parts = [f"<article><h3>{one.rank}: {_text(one.metric)} {number(one.value, one.unit)}</h3>"]
    subject = " · ".join(str(sample[key]) for key in ("subtask", "group") if sample.get(key))
    parts.append(f'<p class="quiet">{_text(" · ".join(filter(None, (sample["id"], subject))))}</p><dl>')
    texts = {"answer": sample.get("text"), "reference": sample.get("reference")}
    texts = {"asked": prompt, **texts} if prompt else texts
    parts += [f'<dt>{key}</dt><dd dir="auto">{_text(text or "-")}</dd>' for key, text in texts.items()]
    if sample.get("failure"):
        parts.append(f'<dt>failure</dt><dd class="failure">{_text(sample["failure"])}</dd>')
    parts.append("</dl>")
    if picture is not None:
        alt = f"Three planes of {sample['id']} with what is true and what was answered"
        parts.append(f'<img src="{_text(picture)}" alt="{_text(alt)}" loading="lazy">')
    return "\n".join([*parts, "</article>"])


def _document(metrics: Mapping[str, Any], sections: Sequence[str]) -> str:
    facts, table = facts_of(metrics), sheet([metrics])
    title = f"M3D-Bench: {facts['model']}"
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        f'<p class="quiet">{_text("; ".join(f"{key}: {value}" for key, value in facts.items()))}</p>',
        *_table(table),
        *(f'<p class="quiet">{_text(note)}</p>' for note in table.notes if note != NOTICE),
        f'<p class="failure">{NOTICE}</p>',
        *sections,
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def _table(found: Sheet) -> Iterator[str]:
    columns = found.columns()
    heads = "".join(f"<th>{_text(heading)}</th>" for heading in columns)
    yield f'<div class="wide"><table><thead><tr>{heads}</tr></thead>'
    for row, cells in zip(found.rows, zip(*columns.values(), strict=True), strict=True):
        kind = "" if row.footnote is None else ' class="published"'
        yield f"<tr{kind}>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
    yield "</table></div>"


@contextmanager
def _in_place_of(page: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of ``page``; what was there goes only once it has."""
    aside = page.with_name(f".{uuid.uuid4().hex[:8]}.{page.name}")
    try:
        with atomic_path(page) as fresh:
            yield fresh
            if page.exists():
                page.replace(aside)
    except BaseException:
        if aside.exists():
            aside.replace(page)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _text(text: object) -> str:
    """Text for HTML, in an element or a quoted attribute."""
    seen = (letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in str(text))
    return escape("".join(seen))


def _unmarked(text: str) -> str:
    """Text for matplotlib, which would read formulas between dollars."""
    return text.replace("$", r"\$")
