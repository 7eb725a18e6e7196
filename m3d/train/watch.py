"""What can be watched while it runs: progress, scalars, speed, memory, and sample predictions."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback

from data_prep.atomic import atomic_path
from m3d.train.engines import at_hand, rank

log = logging.getLogger(__name__)
GIB = 1 << 30
_COUNTED = ("volumes", "tokens", "pairs", "masks")
LOST = ("cut", "refused", "left the picture", "over max_tokens")
"""What becomes of exchanges that do not fit (m3d/train/views.py); a step's row has how many, where there are any."""


class Speed:
    """What passes through a second, by the step: saving and evaluating are not counted."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def restart(self) -> None:
        """Begin to count now."""
        self._since = time.monotonic()

    def row(self, samples: int, counts: Mapping[str, float]) -> dict[str, float]:
        """Rates of the step that ends now, over all processes, and the most memory this one ever held."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        self.restart()
        rates = {"samples": float(samples)} | {name: counts[name] for name in _COUNTED if name in counts}
        row = {f"{name}/s": value / seconds for name, value in rates.items()}
        row |= {f"lost/{name}": counts[name] for name in LOST if counts.get(name)}
        return row | {"seconds": seconds, "memory_gib": peak_memory()}


def peak_memory() -> float:
    """GiB: of the GPU where one is used, of the process on the CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


class LossLog(TrainerCallback):
    """One line a step in ``losses.jsonl``, one an evaluation in ``evaluations.jsonl``; each step stands there once."""

    def __init__(self, output: Path) -> None:
        self.losses, self.evaluations = output / "losses.jsonl", output / "evaluations.jsonl"
        self._files: dict[Path, TextIO] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Forget what lies behind the step from which it goes on: it will come again."""
        if rank() == 0:
            for path in (self.losses, self.evaluations):
                truncate(path, state.global_step)
                self._files[path] = path.open("a", encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:  # noqa: ANN401
        """Write a line; summaries at the end of training are neither."""
        logs = logs or {}
        evaluated = any(name.startswith("eval_") for name in logs)
        path = self.evaluations if evaluated else self.losses
        if path in self._files and (evaluated or "loss" in logs):
            self._files[path].write(json.dumps({"step": state.global_step, **logs}) + "\n")
            self._files[path].flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def truncate(path: Path, step: int) -> None:
    """Drop the lines after a step, and half a line that a killed process left."""
    if not path.is_file():
        return
    rows = [row for row in _rows(path) if row["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is no JSON; remove that line or the file") from None


class Progress(TrainerCallback):
    """A bar with the time that is left; where nobody sits before a terminal, a line every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._bar: tqdm[Any] | None = None
        self._begun = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Begin where training goes on."""
        self._begun = (state.global_step, time.monotonic())
        if rank() == 0 and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:  # noqa: ANN401
        """Show the losses by name."""
        if rank() != 0 or logs is None or "loss" not in logs:
            return
        shown = {name: f"{logs[name]:.4g}" for name in _losses_in(logs)}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(state.global_step - self._bar.n)
        elif state.global_step % self.every == 0 or state.global_step == state.max_steps:
            named = " ".join(f"{name} {value}" for name, value in shown.items())
            log.info("step %d/%d, %s left: %s", state.global_step, state.max_steps, self._left(state), named)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _left(self, state: Any) -> str:  # noqa: ANN401
        first, since = self._begun
        done = max(1, state.global_step - first)
        return tqdm.format_interval((time.monotonic() - since) / done * (state.max_steps - state.global_step))


def _losses_in(logs: Mapping[str, Any]) -> list[str]:
    """Names of losses: those before the gradient's norm, as the trainer orders a row."""
    names = list(logs)
    return names[: names.index("grad_norm")] if "grad_norm" in names else ["loss"]


class Scalars(TrainerCallback):
    """Every number of every step for TensorBoard, in ``OUTPUT/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    @staticmethod
    def available() -> bool:
        """Whether TensorBoard is installed; a notice where not."""
        found = importlib.util.find_spec("tensorboard") is not None
        if not found and rank() == 0:
            log.warning("no TensorBoard scalars (losses.jsonl has them all): pip install 'm3d-lamed[train]'")
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Open a file that hides what an earlier process wrote beyond this step."""
        if rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:  # noqa: ANN401
        """Write all numbers."""
        if self._writer is None or logs is None:
            return
        for name, value in logs.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                self._writer.add_scalar(tag, value, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Samples(TrainerCallback):
    """Sample predictions every ``every`` steps, written by a function that is given the step and a folder.

    It is called in evaluation mode and leaves no trace in the random numbers. Where processes hold pieces of the
    weights (``together``), all must call it; those but the first get a folder that is thrown away. Pictures that cannot
    be made are a warning, not the end of a run of days.
    """

    def __init__(
        self,
        every: int,
        write: Callable[[int, Path], None],
        folder: Path,
        *,
        objective: nn.Module,
        together: bool = False,
    ) -> None:
        self.every, self.write, self.folder = every, write, folder
        self.objective, self.together = objective, together

    def on_step_end(self, args: Any, state: Any, control: Any, **seen: Any) -> None:  # noqa: ANN401
        """Write them."""
        step = state.global_step
        due = step % self.every == 0 or step == state.max_steps
        if not due or (rank() != 0 and not self.together):
            return
        with aside(self.objective), at_hand(seen["model"]), tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / "samples"
            target.mkdir()
            try:
                self.write(step, target)
            except (OSError, ValueError) as error:
                log.warning("no sample predictions at step %d: %s", step, error)
            else:
                if rank() == 0:
                    _publish(target, self.folder / f"step-{step:06d}")


def _publish(made: Path, folder: Path) -> None:
    """Show a folder under its name when all is in it; one of a run that was killed gives way."""
    if folder.exists():
        shutil.rmtree(folder)
    with atomic_path(folder) as temporary:
        shutil.copytree(made, temporary)


@contextlib.contextmanager
def aside(objective: nn.Module) -> Iterator[None]:
    """Look at a model between two steps: no gradients, evaluation mode, and random numbers as if nothing was.

    Where weights are bfloat16, some or all (DeepSpeed's are), so is what is computed.
    """
    modes = {module: module.training for module in objective.modules()}
    python, numbers = random.getstate(), np.random.get_state()
    objective.eval()
    half = any(parameter.dtype == torch.bfloat16 for parameter in objective.parameters())
    device = next((parameter.device.type for parameter in objective.parameters()), "cpu")
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            torch.autocast(device, torch.bfloat16, enabled=half),
        ):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        random.setstate(python)
        np.random.set_state(numbers)
