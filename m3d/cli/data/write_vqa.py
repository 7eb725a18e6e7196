"""`m3d data write-vqa REPORTS`: questions from reports, written and checked by a language model, or by rules."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3d.cli.common import DEVICES, console, note, numbers, say, say_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from data_prep.questions_from_reports import Endpoint, Job, Report, Summary

DESCRIPTION = """\
Write multiple-choice questions (plane, phase, organ, abnormality, location; four options each) from radiology reports.

A language model writes them, rules and the model itself drop what the report does not bear out, and a second pass
keeps only what the model answers the same way from the report alone with the options in another order. --rules needs
no model. A run that was stopped goes on where it was: run it again. Reports are patient data: only a server on this
machine is asked unless you say --allow-remote."""
EPILOG = """\
examples:
  m3d data write-vqa reports.csv --out vqa --rules
  m3d data write-vqa store/records.jsonl --base-url http://localhost:8000/v1 --model Qwen2.5-72B-Instruct --dry-run
  m3d data write-vqa store/records.jsonl --out vqa --base-url http://localhost:8000/v1 --model Qwen2.5-72B-Instruct
  m3d data write-vqa reports.csv --out vqa --local-model models/Qwen2.5-7B-Instruct --limit 20
  m3d data write-vqa reports.csv --out vqa --base-url https://llm.example.org/v1 --model big --api-key-env LLM_KEY \\
      --prices 0.5,1.5 --allow-remote

DIR then holds questions.jsonl, rejects.jsonl (with stage and reason), ledger.jsonl (tokens and cost of each call),
progress.jsonl and settings.json; and records.jsonl, where REPORTS were records.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument(
        "reports", metavar="REPORTS", type=Path, help="records (.jsonl, task report) or a table (.csv: image,text)"
    )
    who = parser.add_argument_group("who writes (one of the three)")
    one = who.add_mutually_exclusive_group(required=True)
    one.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible server, such as http://localhost:8000/v1")
    one.add_argument("--local-model", metavar="FOLDER", type=Path, help="a chat model on disk (safetensors)")
    one.add_argument("--rules", action="store_true", help="no model: vocabulary and negation rules, English only")
    who.add_argument("--device", choices=DEVICES, default="auto", help="of the model on disk (auto)")
    who.add_argument("--model", metavar="NAME", help="the model's name on the server")
    who.add_argument(
        "--api-key-env", metavar="NAME", help="the NAME of the variable with the key; never the key itself"
    )
    who.add_argument(
        "--allow-remote", action="store_true", help="let the reports leave this machine: they are patient data"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--limit", type=int, metavar="N", help="only the first N reports")
    how.add_argument("--dry-run", action="store_true", help="show the exact first prompt, ask nothing, write nothing")
    how.add_argument(
        "--seed", type=int, default=0, help="of the options' order and of the model, where it takes one (0)"
    )
    how.add_argument(
        "--prompts", type=Path, metavar="YAML", help="own wording, in the form of the shipped prompts.yaml"
    )
    how.add_argument("--temperature", type=float, default=0.0, help="of the model (0)")
    how.add_argument("--max-tokens", type=int, default=1500, metavar="N", help="longest reply (1500)")
    how.add_argument("--concurrency", type=int, default=8, metavar="N", help="reports asked about at once (8)")
    how.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for one reply (120)")
    how.add_argument("--retries", type=int, default=6, metavar="N", help="after 429, 5xx, timeouts, resets (6)")
    how.add_argument(
        "--reasks", type=int, default=2, metavar="N", help="after a reply that is not the JSON asked for (2)"
    )
    how.add_argument("--prices", type=numbers(2), metavar="IN,OUT", help="of a million prompt and completion tokens")


def run(arguments: argparse.Namespace) -> int:
    """Write questions; 0 when every report is finished, 1 when some are left for another run."""
    from data_prep.questions_from_reports import read_reports

    _check(arguments)
    reports = read_reports(arguments.reports)
    if arguments.dry_run:
        return _dry_run(arguments, reports)
    if arguments.rules:
        return _by_rules(arguments, reports)
    return _by_model(arguments, reports)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.base_url is not None and not arguments.model:
        raise ValueError("--base-url needs --model NAME, the model's name on that server")
    if arguments.out is None and not arguments.dry_run:
        raise ValueError("--out DIR is needed: the questions, rejects and ledger go there")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit} leaves no report; give 1 or more")
    if not arguments.timeout > 0 or arguments.max_tokens < 1 or not arguments.temperature >= 0:
        raise ValueError("--timeout and --max-tokens must be positive, --temperature not negative")
    if arguments.base_url is not None:
        from data_prep.questions_from_reports.endpoints import check_address

        check_address(arguments.base_url, allow_remote=arguments.allow_remote)


def _dry_run(arguments: argparse.Namespace, reports: Sequence[Report]) -> int:
    """The conversation as it would be sent, and how many of them there are."""
    from data_prep.questions_from_reports import load_prompts

    number = len(reports[: arguments.limit])
    if arguments.rules:
        note(f"{number} reports; the rules send nothing anywhere")
        return 0
    prompts = load_prompts(arguments.prompts)
    messages = prompts.write(reports[0].text)
    if arguments.json:
        say_json({"prompt_version": prompts.version, "template_sha256": prompts.sha256, "messages": messages})
        return 0
    for message in messages:
        say(f"[{message['role']}]\n{message['content']}\n")
    note(f"prompts {prompts.version}, sha256 {prompts.sha256[:12]}; {number} reports of 3 calls or more; none was made")
    return 0


def _by_rules(arguments: argparse.Namespace, reports: Sequence[Report]) -> int:
    from data_prep.atomic import refuse_overwrite
    from data_prep.questions_from_reports import write_by_rules
    from data_prep.questions_from_reports.progress import PROGRESS, QUESTIONS

    if (arguments.out / PROGRESS).exists():
        raise ValueError(f"{arguments.out} holds questions of a language model; give the rules another --out")
    refuse_overwrite(arguments.out / QUESTIONS, arguments.force)
    chosen = reports[: arguments.limit]
    return _deliver(arguments, chosen, write_by_rules(chosen, arguments.out, seed=arguments.seed))


def _by_model(arguments: argparse.Namespace, reports: Sequence[Report]) -> int:
    from tqdm import tqdm

    from data_prep.questions_from_reports import write_questions
    from data_prep.questions_from_reports.progress import PROGRESS, QUESTIONS

    if (arguments.out / QUESTIONS).exists() and not (arguments.out / PROGRESS).exists() and not arguments.force:
        raise FileExistsError(f"{arguments.out / QUESTIONS} is not of such a run; use another --out, or --force")
    job, endpoint = _job(arguments), _endpoint(arguments)
    total = len(reports[: arguments.limit])
    with tqdm(total=total, unit="report", desc=endpoint.model, dynamic_ncols=True, disable=None) as bar:
        summary = write_questions(reports, arguments.out, endpoint=endpoint, job=job, tell=_teller(bar))
    for name, reason in summary.unfinished.items():
        note(f"not finished: {name}: {reason}")
    return _deliver(arguments, reports, summary)


def _job(arguments: argparse.Namespace) -> Job:
    from data_prep.questions_from_reports import Job, Patience, Prices, load_prompts

    prices = arguments.prices
    return Job(
        prompts=load_prompts(arguments.prompts),
        seed=arguments.seed,
        reasks=arguments.reasks,
        concurrency=arguments.concurrency,
        patience=Patience(retries=arguments.retries),
        prices=None if prices is None else Prices(prompt=prices[0], completion=prices[1]),
        limit=arguments.limit,
        restart=arguments.force,
    )


def _endpoint(arguments: argparse.Namespace) -> Endpoint:
    if arguments.local_model is not None:
        from m3d.inference.chat import LocalChat

        return LocalChat(arguments.local_model, device=arguments.device, max_tokens=arguments.max_tokens)
    from data_prep.questions_from_reports import OpenAIEndpoint

    return OpenAIEndpoint(
        arguments.base_url,
        model=arguments.model,
        api_key_env=arguments.api_key_env,
        allow_remote=arguments.allow_remote,
        timeout=arguments.timeout,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
    )


def _teller(bar: Any) -> Callable[[Summary], None]:  # noqa: ANN401 - tqdm's class is generic in what it iterates
    def tell(summary: Summary) -> None:
        bar.n = min(summary.finished, bar.total)
        cost = summary.spending.cost
        bar.set_postfix(
            kept=summary.kept.total(), rejected=summary.rejected.total(), cost="-" if cost is None else f"{cost:.4f}"
        )

    return tell


def _deliver(arguments: argparse.Namespace, reports: Sequence[Report], summary: Summary) -> int:
    """Write the records where they have images, then say what came of it."""
    records = _write_records(arguments.out, reports)
    asked = len(reports)
    if arguments.json:
        say_json({**_as_dict(summary, asked), "records": records, "out": str(arguments.out)})
    else:
        _print_table(summary, asked)
        note(f"saved {arguments.out}" + (f", {records} records" if records else ""))
    return 1 if summary.unfinished else 0


def _write_records(out: Path, reports: Sequence[Report]) -> int:
    from data_prep.questions_from_reports import read_written, to_records
    from data_prep.questions_from_reports.progress import QUESTIONS
    from data_prep.records import write_records

    known = {report.id: report.record for report in reports if report.record is not None}
    if not known:
        return 0
    rows = read_written(out / QUESTIONS)
    records = (one for row in rows if (found := known.get(row["report_id"])) for one in to_records(row, found))
    return write_records(out / "records.jsonl", records)


def _as_dict(summary: Summary, asked: int) -> dict[str, Any]:
    spending = summary.spending
    return {
        "reports": asked,
        "finished": summary.finished,
        "unfinished": summary.unfinished,
        "kept": dict(summary.kept),
        "rejected": dict(summary.rejected),
        "calls": spending.calls,
        "failed_calls": spending.failed,
        "unmetered_calls": spending.unmetered,
        "prompt_tokens": spending.prompt_tokens,
        "completion_tokens": spending.completion_tokens,
        "cost": spending.cost,
    }


def _print_table(summary: Summary, asked: int) -> None:
    from rich.table import Table

    from data_prep.questions_from_reports import TOPICS

    spending = summary.spending
    table = Table("", "", title=f"{summary.finished} of {asked} reports")
    for topic in TOPICS:
        table.add_row(f"kept: {topic}", str(summary.kept[topic]))
    table.add_row("kept: all", str(summary.kept.total()), end_section=True)
    for stage, count in sorted(summary.rejected.items()):
        table.add_row(f"rejected: {stage}", str(count))
    if spending.calls:
        table.add_section()
        table.add_row("calls (of them failed)", f"{spending.calls} ({spending.failed})")
        table.add_row("tokens in / out", f"{spending.prompt_tokens} / {spending.completion_tokens}")
        unmetered = f", {spending.unmetered} answers without counts" if spending.unmetered else ""
        cost = "no prices given" if spending.cost is None else f"{spending.cost:.4f}"
        table.add_row("cost", cost + unmetered)
    console().print(table)
