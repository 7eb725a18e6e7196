"""A dry run as tables: what learns, what a step reads, what memory it needs, and of which data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m3d.cli.common import console

if TYPE_CHECKING:
    from rich.table import Table

    from m3d.recipes.plan import Plan
    from m3d.train.estimate import Verdict

GIB = 2**30


def show(plan: Plan, config: str) -> None:
    """Print a plan."""
    out = console()
    out.print(f"[bold]{plan.stage}[/bold]  {config}\n{plan.model}")
    if plan.parts:
        out.print(_parts(plan))
    for line in plan.lines():
        out.print(line)
    if plan.mix:
        out.print(_mix(plan))
    if plan.verdicts:
        out.print(_memory(plan))
        for verdict in plan.verdicts:
            colour = "green" if verdict.fits else "yellow"
            out.print(f"  {verdict.machine}: [{colour}]{verdict.advice}[/{colour}]")
    for note in plan.notes:
        out.print(f"[dim]note: {note}[/dim]")
    for number, stage in enumerate(plan.stages, start=1):
        out.print()
        show(stage, f"{number} of {len(plan.stages)}")


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    return table


def _parts(plan: Plan) -> Table:
    table = _table("parameters", "part", "learns", "values that learn", "values")
    for part in plan.parts:
        table.add_row(part.name, part.how, f"{part.trainable:,}" if part.trainable else "-", f"{part.total:,}")
    table.add_section()
    table.add_row("all", "", f"{plan.trainable:,}", f"{plan.total:,}")
    return table


def _mix(plan: Plan) -> Table:
    table = _table("data mix", "task", "records", "images that have it", "weight")
    for row in plan.mix:
        table.add_row(row.task, f"{row.records:,}", f"{row.images:,}", f"{row.weight:g}")
    return table


def _memory(plan: Plan) -> Table:
    names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "reserve", "total")
    table = _table("memory of a GPU, estimated, GiB", "", *[verdict.machine for verdict in plan.verdicts])
    rows: list[tuple[str, Any]] = [
        ("engine", lambda v: v.setup.engine),
        ("rows at a time", lambda v: str(v.setup.micro_batch)),
        ("accumulated", lambda v: str(v.setup.accumulation)),
        ("checkpointing", lambda v: "yes" if v.setup.checkpointing else "no"),
    ]
    for name, said in rows:
        table.add_row(name, *[said(verdict) for verdict in plan.verdicts])
    table.add_section()
    for name in names:
        table.add_row(name, *[f"{getattr(verdict.memory, name) / GIB:.1f}" for verdict in plan.verdicts])
    if any(verdict.memory.host for verdict in plan.verdicts):
        table.add_row("on the host", *[f"{verdict.memory.host / GIB:.1f}" for verdict in plan.verdicts])
    table.add_section()
    table.add_row("there is", *[f"{verdict.gib:.1f}" for verdict in plan.verdicts])
    table.add_row("", *[_verdict(verdict) for verdict in plan.verdicts])
    return table


def _verdict(verdict: Verdict) -> str:
    return "[green]fits[/green]" if verdict.fits else "[red]does not fit[/red]"
