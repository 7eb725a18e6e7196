"""`m3d bench score DIR`: metrics, table and page from answers on disk; no model runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3d.cli.common import console, note, say_json
from m3d.cli.data.prepare import count
from m3d.config import load_config

if TYPE_CHECKING:
    from m3d.bench.cases import BenchCase
    from m3d.bench.config import BenchConfig
    from m3d.bench.metrics.base import Metric
    from m3d.bench.score import Judged

DESCRIPTION = """\
Judge the answers of a run: samples.jsonl (every answer beside its truth), metrics.json (values with 95 % intervals over
patients, the blind twin beside them), table.md, and page/index.html with the best, median and worst cases. Nothing is
asked again. Protocol `standard` is correct; `m3d` computes what the released evaluation of M3D-LaMed computes, defects
included, so that its published numbers can be compared; its results go beside the others, as *.m3d.*.
"""
EPILOG = """\
Answers of another system are scored likewise: a folder with predictions.jsonl, a line an answer, named by its record:
  {"id": "openkbp/pt_201/report/001", "text": "...", "boxes": [[d0, h0, w0, d1, h1, w1]],
   "masks": [{"name": "liver", "file": "masks/1.nii.gz"}]}
Boxes are fractions of the image; masks NIfTI on the grid that is judged.

examples:
  m3d bench score bench/tiny
  m3d bench score bench/tiny --protocol m3d
  m3d bench score other --config configs/bench/derived.yaml --data stores/openkbp split=validation
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run, or a folder with predictions.jsonl")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values of --config that are replaced")
    group = parser.add_argument_group("how")
    group.add_argument("--protocol", choices=("standard", "m3d"), default="standard", help="(standard)")
    group.add_argument("--data", type=Path, metavar="STORE", help="the store, where it is not the one of run.json")
    group.add_argument("--config", type=Path, metavar="CONFIG", help="what was asked, for another system's answers")
    group.add_argument("--workers", type=count(1), metavar="N", help="processes that judge masks (one a core)")
    group.add_argument("--bert-score", type=Path, metavar="FOLDER", help="also BERTScore of texts, with a local model")
    group.add_argument(
        "--clinical", nargs="+", default=[], metavar="MEASURE", help="also these of RadEval (extra [clinical])"
    )
    group.add_argument("--no-page", action="store_true", help="no page of pictures")


def run(arguments: argparse.Namespace) -> int:
    """Judge, write, print."""
    from data_prep.atomic import atomic_path
    from m3d.bench.cases import find_cases
    from m3d.bench.predictions import PARTS, gather, gathered
    from m3d.bench.score import judge_samples, metrics_table, write_samples
    from m3d.bench.table import markdown, terminal

    folder: Path = arguments.folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; `m3d bench run CONFIG ... --out {folder}` makes one")
    about, config, data = _setting(arguments)
    cases = find_cases(config, data, None)
    predictions, extra = gathered(folder), _extra(arguments)
    _check_known(folder, cases, predictions)
    if (folder / PARTS).is_dir():  # processes of torchrun leave parts only; another system's file stays as it is
        gather(folder)
    retrieval, rows = _retrieval(arguments, config, cases)
    judged = judge_samples(
        folder, cases, predictions, arguments.protocol, extra=extra, workers=arguments.workers, progress=_progress
    )
    found = metrics_table(judged, arguments.protocol, about, extra)
    found["tasks"] = {**retrieval, **found["tasks"]}
    rows += [one.to_row() for one in judged]
    names = _names(arguments.protocol)
    write_samples(folder / names["samples"], rows)
    with atomic_path(folder / names["metrics"]) as temporary:
        temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(folder / names["table"]) as temporary:
        temporary.write_text(markdown([found]), encoding="utf-8")
    if arguments.json:
        say_json(found)
    else:
        console().print(terminal([found]))
    saved = [folder / name for name in names.values()]
    if arguments.protocol == "standard" and not arguments.no_page:
        saved.append(_page(folder, cases))
    for path in saved:
        note(f"saved {path}")
    return 0


def _extra(arguments: argparse.Namespace) -> list[Metric]:
    """Metrics of texts that need a model of their own."""
    found: list[Metric] = []
    if arguments.bert_score is not None:
        from m3d.bench.metrics.embedded import BertScore

        found.append(BertScore(arguments.bert_score))
    if arguments.clinical:
        from m3d.bench.metrics.clinical import Clinical

        found += [Clinical(name) for name in arguments.clinical]
    return found


def _retrieval(
    arguments: argparse.Namespace, config: BenchConfig, cases: Iterable[BenchCase]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The task's entry and its samples; neither where it was not run."""
    folder: Path = arguments.folder
    if "retrieval" not in config.tasks:
        return {}, []
    if not (folder / "retrieval").is_dir():
        note(f"{folder / 'retrieval'} is not there: retrieval is left out; `m3d bench run` with --clip makes it")
        return {}, []
    from m3d.bench.retrieval import retrieval_samples, score_retrieval, subset_pools

    captions = [record for case in cases for record in case.records if record.task == "retrieval"]
    pools, twin = subset_pools(captions, config.pools) or None, config.blind is not None
    found = score_retrieval(folder, arguments.protocol, pools=pools, twin=twin)
    return {"retrieval": found}, retrieval_samples(folder, arguments.protocol, pools=pools, twin=twin)


def _names(protocol: str) -> dict[str, str]:
    """The files of a protocol's results."""
    tag = "" if protocol == "standard" else f".{protocol}"
    return {"samples": f"samples{tag}.jsonl", "metrics": f"metrics{tag}.json", "table": f"table{tag}.md"}


def _setting(arguments: argparse.Namespace) -> tuple[dict[str, Any], BenchConfig, Path]:
    """What stands in metrics.json of the run, what was asked, and where the records are."""
    from pydantic import TypeAdapter

    from data_prep.store import file_sha256
    from m3d.bench.config import BenchConfig
    from m3d.bench.run import RUN, read_run

    if not (arguments.folder / RUN).is_file():
        if arguments.config is None or arguments.data is None:
            raise FileNotFoundError(
                f"{arguments.folder / RUN} is missing; of another system's answers say what was asked: "
                "--config CONFIG --data STORE"
            )
        config = load_config(BenchConfig, arguments.config, arguments.overrides)
        foreign = {
            "model": {"id": arguments.folder.absolute().name, "fingerprint": None},
            "grid": "store" if config.scans is None else "scan",
            "data": {"name": arguments.data.absolute().name, "split": config.split},
        }
        return foreign, config, arguments.data
    if arguments.overrides or arguments.config:
        raise ValueError(f"{arguments.folder} says itself what was asked; leave --config and key=value out")
    run = read_run(arguments.folder)
    where = run["where"]
    fields = {**run["config"], "scans": where["scans"], "root": where["root"]}
    config = TypeAdapter(BenchConfig).validate_python(fields)
    data = Path(arguments.data or where["data"])
    if file_sha256(data / "records.jsonl") != run["data"]["records_sha256"]:
        raise ValueError(
            f"{data}: its records are not those that {arguments.folder} was asked; give that store, or run anew"
        )
    about = {key: run[key] for key in ("model", "clip", "grid")}
    about["data"] = {**run["data"], "split": config.split}
    about["commit"] = run["machine"]["commit"]
    return about, config, data


def _check_known(folder: Path, cases: Iterable[BenchCase], predictions: Mapping[tuple[str, str], Any]) -> None:
    """Refuse answers to records that nobody asked, which are of another store or config, and no answers at all."""
    if not predictions and not (folder / "retrieval").is_dir():
        raise FileNotFoundError(
            f"{folder}: no answers are there; `m3d bench run CONFIG ... --out {folder}` asks for them"
        )
    known = {question.name for case in cases for question in case.questions}
    unknown = sorted({question for question, _ in predictions} - known)
    if unknown:
        raise ValueError(
            f"{folder}: {len(unknown)} answers are to records that were not asked, such as {unknown[0]!r}; "
            "give the --data and --config that they are of"
        )


def _progress(some: Iterable[list[Judged]], total: int) -> Iterator[list[Judged]]:
    from tqdm import tqdm

    yield from tqdm(some, total=total, unit="scan", desc="judging")


def _page(folder: Path, cases: Iterable[BenchCase]) -> Path:
    from m3d.bench.page import write_page
    from m3d.bench.pictures import pictures

    return write_page(folder, picture=pictures(folder, cases))
