"""Stages in order, one command: what is done is skipped, what was stopped goes on, what has changed begins anew.

``m3d train configs/tiny/chain.yaml root=PATH``. A stage is done when its output has a final manifest of the same
configuration, the same data and the same weights to begin from; so a change of one stage runs those after it again.
"""

import dataclasses
import json
import logging
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from m3d.config import hint, load_config
from m3d.recipes.checkpoints import begin_manifest, state_of
from m3d.recipes.parts import Parts
from m3d.recipes.registry import recipe, stage_of
from m3d.train import engines
from m3d.train.engines import Engine, sibling

log = logging.getLogger(__name__)

PATHS = ("output", "stores", "checkpoint", "language_model", "vision_tower", "segvol", "perceiver", "clip", "init")
"""Settings of stages that are folders, where they hold text."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage: its config, and ``key=value`` for it alone."""

    config: str
    set: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything the chain can be told.

    Attributes:
        stages: In order.
        root: Where the stages' relative folders begin.
        shared: Settings by dotted name, for every stage that knows them.
        engine: What of every stage's engine is replaced, such as ``{name: zero2}``; the rest stays each stage's own.
    """

    stage: Literal["chain"] = "chain"
    stages: tuple[Step, ...]
    root: str = "."
    output: str | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse nothing to do, and what no engine has; ``output`` is what the command line calls ``root``."""
        if not self.stages:
            raise ValueError("stages is empty; list the configs of stages in their order")
        known = [one.name for one in dataclasses.fields(Engine)]
        if unknown := sorted(set(self.engine or ()) - set(known)):
            raise ValueError(f"engine.{unknown[0]}: no engine has it; {hint(unknown[0], known)}")
        if self.output is not None:
            object.__setattr__(self, "root", self.output)


def main(config: Config, *, resume: bool = True) -> list[dict[str, Any]]:
    """Run what is not done; a row for each stage, with its state before and its output."""
    del resume  # a chain always goes on
    links = list(load(config))  # all are read before the first begins
    rows = []
    for stage, link in links:
        output, facts = Path(link.output), _facts(link)
        before = state_of(output, facts)
        rows.append({"stage": stage, "output": output.name, "before": before})
        if before == "done":
            log.info("%s: done (%s)", stage, output)
            continue
        if before != "to do":
            _move_away(output, before, facts)
        log.info("%s: %s", stage, output)
        recipe(stage).main(link, resume=True)
        engines.barrier()
        _wait(partial(_is_done, link))  # one process may have made it alone
    return rows


def load(config: Config) -> Iterator[tuple[str, Any]]:
    """The stages' own configs, with what is shared, their folders under ``root``.

    Raises:
        FileNotFoundError: A stage's config is not there.
        ValueError: It has wrong keys, or no stage knows a shared one.
    """
    unknown = set(config.shared)
    for step in config.stages:
        stage = stage_of(step.config)
        schema = recipe(stage).Config
        known = [name for name in config.shared if knows(schema, name)]
        unknown -= set(known)
        shared = [f"{name}={json.dumps(config.shared[name])}" for name in known]
        found = under(load_config(schema, step.config, [*shared, *step.set]), Path(config.root))
        if config.engine is not None and hasattr(found, "engine"):
            found = dataclasses.replace(found, engine=_replaced(found.engine, config.engine))
        yield stage, found
    if unknown:
        name = min(unknown)
        raise ValueError(f"shared.{name}: no stage knows it; {hint(name, PATHS)}")


def _replaced(engine: Engine, given: dict[str, Any]) -> Engine:
    """Another engine takes its own DeepSpeed file for the same machine, where there is one."""
    name = given.get("name", engine.name)
    if engine.deepspeed is not None and name != engine.name:
        given = {"deepspeed": sibling(engine.deepspeed, name), **given}
    return dataclasses.replace(engine, **given)


def knows(schema: Any, dotted: str) -> bool:  # noqa: ANN401 - a type
    """Whether a dataclass has a setting of that dotted name."""
    first, _, rest = dotted.partition(".")
    for option in _options(schema):
        if not dataclasses.is_dataclass(option):
            continue
        if first in [one.name for one in dataclasses.fields(option)]:
            return not rest or knows(typing.get_type_hints(option)[first], rest)
    return typing.get_origin(schema) is dict


def _options(kind: Any) -> tuple[Any, ...]:  # noqa: ANN401
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def under(config: Any, root: Path) -> Any:  # noqa: ANN401 - any stage's dataclass
    """The same settings with every relative folder below ``root``; a package's own name stays as it is."""
    changed: dict[str, Any] = {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if isinstance(value, Parts):
            continue  # its `language_model` is a way of learning
        if dataclasses.is_dataclass(value):
            changed[one.name] = under(value, root)
        elif one.name in PATHS and isinstance(value, str):
            changed[one.name] = str(root / value)
        elif one.name in PATHS and isinstance(value, list | tuple):
            changed[one.name] = tuple(str(root / one) for one in value)
    return dataclasses.replace(config, **changed)


def _facts(link: Any) -> dict[str, Any]:  # noqa: ANN401
    """What the stage would note of itself if it began now; where a parent is still to be made, no parents."""
    stores = link.data.stores if hasattr(link, "data") else ()
    try:
        return begin_manifest(link, stores=stores, parents=link.parents())
    except FileNotFoundError as error:
        if not any(str(folder) in str(error) for folder in link.parents().values() if folder):
            raise
        return begin_manifest(link, stores=stores)


def _move_away(output: Path, why: str, facts: Mapping[str, Any]) -> None:
    """Keep what another run has left, under another name."""
    if engines.rank() == 0:
        number = next(n for n in range(1, 10_000) if not output.with_name(f"{output.name}.old{n}").exists())
        aside = output.with_name(f"{output.name}.old{number}")
        output.rename(aside)
        log.warning("%s held %s: it is now %s", output, why, aside.name)
    _wait(lambda: not output.exists() or state_of(output, facts) in ("to do", "done"))


def _is_done(link: Any) -> bool:  # noqa: ANN401
    return state_of(Path(link.output), _facts(link)) == "done"


def _wait(until: Callable[[], bool]) -> None:
    """Wait for the first process.

    Before a trainer has brought them together, what it has written must tell the others; if it fails, their launcher
    ends them.
    """
    while engines.rank() != 0 and not until():
        time.sleep(0.5)
