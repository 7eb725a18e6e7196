"""Checkpoints to go on from: whole or not there, the oldest removed, the best kept.

A checkpoint is written under a name that nothing looks for and renamed when all is in it, with a last file that says
so. What is to be removed is renamed first, for the same reason: a process may be killed at any moment.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m3d.train.engines import barrier, gather, rank
from m3d.train.optim import OptimConfig

log = logging.getLogger(__name__)
MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_BOUND = {"batch", "seed"}  # what the position in the data hangs on
_PARTIAL, _OLD = ".partial", ".old"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    folder: Path
    step: int

    @property
    def facts(self) -> dict[str, Any]:
        """What its last file says: engine, processes, configuration."""
        facts: dict[str, Any] = json.loads((self.folder / MARKER).read_text(encoding="utf-8"))
        return facts


def checkpoints(output: Path) -> list[Checkpoint]:
    """The whole ones of a run, oldest first."""
    found = [(path, _NAME.fullmatch(path.name)) for path in output.glob("checkpoint-*")]
    whole = [Checkpoint(path, int(match[1])) for path, match in found if match and (path / MARKER).is_file()]
    return sorted(whole, key=lambda checkpoint: checkpoint.step)


def newest(output: Path) -> Checkpoint | None:
    """The one to go on from, if there is any."""
    return next(reversed(checkpoints(output)), None)


def check_same(last: Checkpoint, engine: str, world: int, config: OptimConfig) -> None:
    """What was saved must fit what runs now: ``single`` and ``ddp`` save the same, the others pieces.

    Raises:
        ValueError: It cannot be gone on with in this way; the message says in which.
    """
    facts = last.facts
    whole = {"single", "ddp"}
    if engine != facts["engine"] and not {engine, facts["engine"]} <= whole:
        raise ValueError(f"{last.folder} was written by engine={facts['engine']}; resume with it, not with {engine}")
    if engine not in whole and world != facts["world"]:
        raise ValueError(f"{last.folder} is in {facts['world']} pieces; resume with --nproc {facts['world']}")
    now = json.loads(json.dumps(asdict(config)))
    changed = {name for name, value in facts["config"].items() if now.get(name) != value}
    if bound := changed & _BOUND:
        name = min(bound)
        raise ValueError(f"{last.folder}: optim.{name} was {facts['config'][name]}, now {now[name]}; keep it")
    if changed:
        log.warning("resuming with other settings than before: optim.%s", ", optim.".join(sorted(changed)))


def sweep(output: Path) -> None:
    """Remove what killed processes left behind; by one process, before training."""
    for path in [*output.glob(".checkpoint-*"), *output.glob(".model.*")]:
        if path.suffix == _PARTIAL or (path.suffix == _OLD and path.name != f".model{_OLD}"):
            shutil.rmtree(path)
    for path in output.glob("checkpoint-*"):
        if _NAME.fullmatch(path.name) and not (path / MARKER).is_file():
            remove(path)
    kept = output / f".model{_OLD}"
    if kept.is_dir() and not (output / "model").exists():
        kept.rename(output / "model")  # killed between the two names


def rotate(output: Path, *, keep: int, best: int | None) -> None:
    """Keep the newest and that of the best step."""
    for checkpoint in checkpoints(output)[:-keep]:
        if checkpoint.step != best:
            remove(checkpoint.folder)


def remove(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its name."""
    old = folder.with_name(f".{folder.name.lstrip('.')}{_OLD}")
    if old.exists():
        shutil.rmtree(old)
    folder.rename(old)
    shutil.rmtree(old)


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Nobody else trains into this folder meanwhile; the system lets go of it when the process ends, however it ends.

    torchrun's processes outlive a torchrun that was killed, and would write between those of the resumed run.

    Raises:
        ValueError: Another process does. All processes raise it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("a") as file:
        taken = False
        if rank() == 0:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                taken = True
            except OSError as error:
                log.warning("%s cannot be locked (%s): start no second run into it", output, error.strerror)
        if gather(taken)[0]:
            raise ValueError(f"{output}: another process is training into it; wait for it, or end it, or use another")
        yield


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder`` that takes its place when all is written; by one process."""
    partial = folder.with_name(f".{folder.name}{_PARTIAL}")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = folder.with_name(f".{folder.name}{_OLD}")
    if folder.exists():
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)
    partial.rename(folder)
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def writing(output: Path, step: int, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A folder that all processes write into together and that becomes ``checkpoint-STEP``."""
    target = output / f"checkpoint-{step}"
    partial = output / f".checkpoint-{step}{_PARTIAL}"
    if rank() == 0:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    barrier()
    yield partial
    barrier()
    if rank() == 0:
        if target.exists():
            remove(target)
        with (partial / MARKER).open("w", encoding="utf-8") as file:
            json.dump({"step": step, **facts}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(target)
    barrier()


def learned(objective: nn.Module) -> dict[str, Tensor]:
    """All that training changes: trainable parameters and buffers, adapters among them; frozen weights stay away."""
    kept = {name: parameter.detach() for name, parameter in objective.named_parameters() if parameter.requires_grad}
    named = objective.state_dict(keep_vars=True)
    return kept | {name: buffer for name, buffer in objective.named_buffers() if name in named}


def write_learned(objective: nn.Module, folder: Path) -> None:
    """Write what training changes, without pickles."""
    save_file({name: value.contiguous() for name, value in learned(objective).items()}, folder / "learned.safetensors")


def read_learned(objective: nn.Module, folder: Path) -> None:
    """Put it back, in place.

    Raises:
        ValueError: Another model, or one with other parts frozen, was trained there.
    """
    stored, here = load_file(folder / "learned.safetensors"), learned(objective)
    odd = sorted(stored.keys() ^ here.keys()) or [
        name for name, value in here.items() if value.shape != stored[name].shape
    ]
    if odd:
        raise ValueError(
            f"{folder} is of another model or of other trainable parts ({odd[0]} and {len(odd) - 1} more differ); "
            "resume with the configuration it was begun with, or choose another output"
        )
    with torch.no_grad():
        for name, value in here.items():
            value.copy_(stored[name])
