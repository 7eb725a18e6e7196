"""One loop that fits on a screen: accumulate, clip, step, report; checkpoints are whole or not at all."""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data_prep.atomic import atomic_path

log = logging.getLogger(__name__)


class Batch(Protocol):
    """What the loop needs of a batch: to be moved, and to say what is in it."""

    ids: tuple[str, ...]

    def to(self, device: torch.device | str) -> Self:
        """Move every tensor."""


class Drawn(Protocol):
    """A source of batches that gives the same one for the same step."""

    def draw(self, step: int) -> Any:  # noqa: ANN401
        """The batch of a step."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine to a tenth; ``bf16`` computes the forward pass in bfloat16.

    A short memory of squared gradients (0.95) matters: masks begin with a few steps of huge gradients, and with 0.999
    these would hold the step size down for a thousand more.
    """

    steps: int = 1000
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = 50
    clip: float = 1.0
    save_every: int = 200
    bf16: bool = False

    def rate(self, step: int) -> float:
        """The learning rate's factor at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def fit(
    objective: nn.Module,
    batches: Drawn,
    config: OptimConfig,
    folder: Path,
    *,
    device: torch.device,
    on_save: Callable[[int], None],
) -> None:
    """Train until ``config.steps``; continues from ``folder/trainer.pt`` where there is one.

    Raises:
        FloatingPointError: A loss is not finite; the ids of the batch are in the message.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, config.rate)
    start = _resume(folder, objective, optimizer, schedule)
    objective.train()
    history = (folder / "losses.jsonl").open("a", encoding="utf-8")
    with history, tqdm(total=config.steps, initial=start, unit="step") as bar:
        for step in range(start, config.steps):
            began = time.monotonic()
            batch = batches.draw(step).to(device)
            torch.manual_seed(step)  # for dropout: a resumed run repeats an uninterrupted one
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                losses = objective(batch, torch.Generator().manual_seed(step))
            total = torch.stack(list(losses.values())).sum()
            _check_finite(total, batch, step)
            total.backward()
            norm = clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            row = {name: loss.item() for name, loss in losses.items()}
            row |= {"step": step, "norm": float(norm), "seconds": time.monotonic() - began}
            history.write(json.dumps(row) + "\n")
            bar.set_postfix({name: f"{row[name]:.3f}" for name in losses})
            bar.update()
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                history.flush()
                _save(folder, step + 1, objective, optimizer, schedule)
                on_save(step + 1)


def _check_finite(total: torch.Tensor, batch: Batch, step: int) -> None:
    if not torch.isfinite(total):
        raise FloatingPointError(f"loss is {total.item()} at step {step}; the batch: {', '.join(batch.ids)}")


def _save(folder: Path, step: int, objective: nn.Module, optimizer: torch.optim.Optimizer, schedule: object) -> None:
    state = {
        "step": step,
        "objective": objective.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),  # type: ignore[attr-defined]
    }
    with atomic_path(folder / "trainer.pt") as temporary:
        torch.save(state, temporary)


def _resume(folder: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, schedule: object) -> int:
    path = folder / "trainer.pt"
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    objective.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])  # type: ignore[attr-defined]
    log.info("continuing from %s at step %d", path, state["step"])
    return int(state["step"])
