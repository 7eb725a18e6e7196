"""`m3d bench judge DIR`: a language model says how much of the truth each written answer holds."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3d.cli.common import DEVICES, console, note, printable, say, say_json
from m3d.convert.hub import cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from data_prep.questions_from_reports import Endpoint
    from m3d.bench.judge import Judging

DESCRIPTION = """\
Let a language model judge reports, open answers and descriptions, seeing and blind: which share of what the reference
says does the answer say as well, from 0 to 100 (as in the M3D paper, figure 5)?

Run it after `m3d bench score DIR`. An empty answer scores 0 and is not asked about; a judge that gives no score however
often it is asked has refused, which counts 0 and is told. What was asked once is never paid for again: run it again to
go on after a stop. References and answers are patient data: only a server on this machine is asked unless you say
--allow-remote."""
EPILOG = """\
examples:
  m3d bench judge bench/tiny --endpoint http://localhost:8000/v1 --model Qwen2.5-72B-Instruct --dry-run
  m3d bench judge bench/tiny --endpoint http://localhost:8000/v1 --model Qwen2.5-72B-Instruct
  m3d bench judge bench/tiny --local models/Qwen2.5-7B-Instruct --tasks report
  m3d bench judge bench/tiny --endpoint https://api.openai.com/v1 --model gpt-4o-mini --allow-remote \\
      --price-in 0.15 --price-out 0.6 --limit 20        what would it cost?
  m3d bench judge bench/tiny --local models/other-7B --out bench/tiny/second-judge

DIR, or --out, then holds judge.jsonl (score and reply of each sample), judge_ledger.jsonl (tokens of each call) and
judge.json: means with 95 % intervals by patient, the gain over the blind twin, refusals, tokens and cost. Scores of
different judges do not compare: name the judge beside them. --force starts over; cached scores still cost nothing.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    from m3d.bench.judge_row import TEXT_TASKS

    parser.add_argument("folder", type=Path, metavar="DIR", help="a run that was scored: it has samples.jsonl")
    who = parser.add_argument_group("who judges (one of the two)")
    one = who.add_mutually_exclusive_group(required=True)
    one.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, such as http://localhost:8000/v1")
    one.add_argument("--local", metavar="FOLDER", type=Path, help="a chat model on disk (safetensors)")
    who.add_argument("--device", choices=DEVICES, default="auto", help="of the model on disk (auto)")
    who.add_argument("--model", metavar="NAME", help="the model's name on the server")
    who.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="the NAME of the variable with the server's key, never the key itself (OPENAI_API_KEY, if that is set)",
    )
    who.add_argument("--allow-remote", action="store_true", help="let the texts leave this machine: patient data")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--tasks", type=_names, metavar="A,B", default=TEXT_TASKS, help=f"separated by commas ({','.join(TEXT_TASKS)})"
    )
    what.add_argument("--limit", type=int, metavar="N", help="only the first N samples")
    what.add_argument("--dry-run", action="store_true", help="show the exact first prompt, ask nothing, write nothing")
    what.add_argument("--cache", type=Path, metavar="FOLDER", help="of scores once given (in the user's cache folder)")
    what.add_argument("--price-in", type=float, metavar="X", help="of a million prompt tokens, in any currency")
    what.add_argument("--price-out", type=float, metavar="X", help="of a million completion tokens")
    how = parser.add_argument_group("how")
    how.add_argument("--seed", type=int, default=0, help="of the judge, where it takes one (0)")
    how.add_argument("--temperature", type=float, default=0.0, help="of the judge (0)")
    how.add_argument("--max-tokens", type=int, default=500, metavar="N", help="longest reply; more if it thinks (500)")
    how.add_argument("--concurrency", type=int, default=8, metavar="N", help="samples asked about at once (8)")
    how.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for one reply (120)")
    how.add_argument("--retries", type=int, default=6, metavar="N", help="after 429, 5xx, timeouts, resets (6)")
    how.add_argument("--reasks", type=int, default=2, metavar="N", help="after a reply without a score (2)")


def run(arguments: argparse.Namespace) -> int:
    """Judge, write, print; 0, or 1 when the judge did not answer about some samples."""
    from tqdm import tqdm

    from m3d.bench.judge import judge

    _check(arguments)
    if arguments.dry_run:
        return _dry_run(arguments)
    job, endpoint = _job(arguments), _endpoint(arguments)
    with tqdm(unit="sample", desc=endpoint.model, dynamic_ncols=True, disable=None) as bar:
        summary = judge(arguments.folder, endpoint=endpoint, job=job, tell=_teller(bar))
    return _deliver(arguments, summary)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse at once what a model would be loaded for in vain."""
    from m3d.bench.judge_row import read_answers
    from m3d.tasks.registry import check_tasks

    check_tasks(arguments.tasks, "--tasks")
    if arguments.endpoint is not None and not arguments.model:
        raise ValueError("--endpoint needs --model NAME, the model's name on that server")
    if (arguments.price_in is None) != (arguments.price_out is None):
        raise ValueError("--price-in and --price-out belong together: give both, or neither")
    if not arguments.timeout > 0 or arguments.max_tokens < 1 or not arguments.temperature >= 0:
        raise ValueError("--timeout and --max-tokens must be positive, --temperature not negative")
    if arguments.endpoint is not None:
        from data_prep.questions_from_reports.endpoints import check_address

        check_address(arguments.endpoint, allow_remote=arguments.allow_remote)
    read_answers(arguments.folder, arguments.tasks)


def _dry_run(arguments: argparse.Namespace) -> int:
    """The first conversation as it would be sent, and how many of them there are at most."""
    from m3d.bench.judge_row import read_answers
    from m3d.bench.judge_words import PROMPT_SHA256, PROMPT_VERSION, ask_for_score

    samples = [one for one in read_answers(arguments.folder, arguments.tasks) if one.task in arguments.tasks]
    asked = [one for one in samples[: arguments.limit] if one.answer]
    messages = ask_for_score(asked[0].reference, asked[0].answer) if asked else []
    contents = len({(one.reference, one.answer) for one in asked})
    if arguments.json:
        say_json({"prompt_version": PROMPT_VERSION, "prompt_sha256": PROMPT_SHA256, "messages": messages})
        return 0
    for message in messages:
        say(f"[{message['role']}]\n{printable(message['content'])}\n")
    note(
        f"prompts {PROMPT_VERSION}, sha256 {PROMPT_SHA256[:12]}; {len(samples)} samples, {len(asked)} of them with an "
        f"answer, {contents} different: at most so many are asked, less what is cached; none was"
    )
    return 0


def _job(arguments: argparse.Namespace) -> Judging:
    from data_prep.questions_from_reports import Patience, Prices
    from m3d.bench.judge import Judging

    prices = None
    if arguments.price_in is not None:
        prices = Prices(prompt=arguments.price_in, completion=arguments.price_out)
    return Judging(
        tasks=arguments.tasks,
        out=arguments.out,
        cache=arguments.cache or cache_dir() / "judge",
        seed=arguments.seed,
        reasks=arguments.reasks,
        concurrency=arguments.concurrency,
        patience=Patience(retries=arguments.retries),
        prices=prices,
        limit=arguments.limit,
        restart=arguments.force,
    )


def _endpoint(arguments: argparse.Namespace) -> Endpoint:
    if arguments.local is not None:
        from m3d.inference.chat import LocalChat

        return LocalChat(arguments.local, device=arguments.device, max_tokens=arguments.max_tokens)
    from data_prep.questions_from_reports import OpenAIEndpoint

    key = arguments.api_key_env or ("OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY", "").strip() else None)
    return OpenAIEndpoint(
        arguments.endpoint,
        model=arguments.model,
        api_key_env=key,
        allow_remote=arguments.allow_remote,
        timeout=arguments.timeout,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
    )


def _teller(bar: Any) -> Callable[[int, int], None]:  # noqa: ANN401 - tqdm's class is generic in what it iterates
    def tell(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return tell


def _deliver(arguments: argparse.Namespace, summary: Mapping[str, Any]) -> int:
    out = arguments.out or arguments.folder
    for name, reason in summary["unreached"].items():
        note(f"not judged: {name}: {reason}")
    if arguments.json:
        say_json({**summary, "out": str(out)})
    else:
        _print(summary)
        note(f"saved {out / 'judge.json'} and judge.jsonl beside it")
    if summary["unjudged"]:
        note(f"{summary['unjudged']} samples are not judged yet; run it again, without --limit, to go on")
    return 1 if summary["unreached"] else 0


def _print(summary: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"content overlap, 0 to 100, judged by {printable(summary['model'])}; 95 % by patient")
    for column in ("", "n", "patients", "score", "refused", "empty", "blind", "gain"):
        table.add_column(column, justify="left" if not column else "right")
    for task, entry in summary["tasks"].items():
        table.add_row(task, *_cells(entry))
        for group, part in entry["groups"].items():
            table.add_row(f"  {printable(group)}", *_cells(part))
    console().print(table)
    note(_spent(summary))


def _cells(entry: Mapping[str, Any]) -> list[str]:
    refused = entry["n_refused"] + entry.get("blind_n_refused", 0)
    empty = entry["n_empty"] + entry.get("blind_n_empty", 0)
    seen = _interval(entry["value"], entry["low"], entry["high"])
    blind, gain = (
        _interval(entry.get(name), entry.get(f"{name}_low"), entry.get(f"{name}_high")) for name in ("blind", "gain")
    )
    return [str(entry["n"]), str(entry["patients"]), seen, str(refused), str(empty), blind, gain]


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if low is None or high is None else f"{value:.1f} ({low:.1f} to {high:.1f})"


def _spent(summary: Mapping[str, Any]) -> str:
    spent = summary["spent"]
    words = [
        f"{summary['n']} judged, {summary['n_refused']} refused (counted 0)",
        f"{spent['calls']} calls, {spent['failed_calls']} of them failed",
        f"tokens in {spent['prompt_tokens']}, out {spent['completion_tokens']}",
        "cost: no prices given" if spent["cost"] is None else f"cost {spent['cost']:.4f}",
    ]
    if spent["unmetered_calls"]:
        words.append(f"{spent['unmetered_calls']} replies without counts of tokens")
    return f"{'; '.join(words)}; {summary['seconds']:.1f} s"
