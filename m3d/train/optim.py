"""How weights move: AdamW, its learning rates by part and over time, and what is never decayed."""

import difflib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

PARTS = ("vision_tower", "perceiver", "language_model", "seg_projector", "seg_head", "text_tower")
NEW_TOKENS = "new_tokens"
OTHER = "other"
_UNDECAYED = ("embed", "token", "position", "learned")  # in the last piece of a parameter's name


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How a stage is optimised.

    Attributes:
        lr: Of every part that ``lr_by_part`` does not name.
        lr_by_part: Such as ``{"vision_tower": 1e-5}``; a part is a piece of the parameter's dotted name, or
            ``new_tokens``.
        betas: A short memory of squared gradients (0.95) where masks are drawn: they begin with a few steps of huge
            gradients, and with 0.999 these would hold the step size down for a thousand more.
        weight_decay: Not on biases, norms, embeddings and tokens.
        warmup: Steps, or a share of all steps where below 1.
        schedule: Falls from ``lr`` to ``floor * lr``, or stays.
        floor: Share of the learning rate that is left at the end.
        steps: Optimizer steps, or None where ``epochs`` says it.
        epochs: Times that the data is seen, or None where ``steps`` says it.
        batch: Items of the data set in one optimizer step, over all processes and micro-batches.
        micro_batch: Items that one device holds at a time; the rest of its share is accumulated.
        clip: Largest norm of the gradient; 0 for none.
        bf16: Compute in bfloat16.
        save_every: Steps between checkpoints.
        eval_every: Steps between evaluations; None for those of the checkpoints.
        keep: Checkpoints kept, the best one apart.
        explode: Stop where a step's loss exceeds this many times the median of the steps before; 0 for never.
        seed: Of everything that is drawn.
        workers: Processes that read data, beside each training process.
        log_every: Steps between lines where there is no terminal for a progress bar.
    """

    lr: float = 1e-4
    lr_by_part: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup: float = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.0
    steps: int | None = None
    epochs: int | None = None
    batch: int = 8
    micro_batch: int = 1
    clip: float = 1.0
    bf16: bool = False
    save_every: int = 200
    eval_every: int | None = None
    keep: int = 2
    explode: float = 30.0
    seed: int = 0
    workers: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give optim.steps or optim.epochs, one of them; got {self.steps} and {self.epochs}")
        for name in ("steps", "epochs", "batch", "micro_batch", "save_every", "eval_every", "keep", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"optim.{name}={value} must be 1 or more")
        for name in ("lr", "weight_decay", "warmup", "floor", "clip", "explode", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be zero or more")
        if self.batch % self.micro_batch:
            raise ValueError(f"optim.micro_batch={self.micro_batch} must divide optim.batch={self.batch}")

    def refuse_seed(self) -> None:
        """Refuse a seed of its own: a stage's recipe has one for everything, and puts it here.

        Raises:
            ValueError: There is one.
        """
        if self.seed:
            raise ValueError(f"optim.seed={self.seed} would be passed over: set seed={self.seed}")

    def num_steps(self, length: int) -> int:
        """Optimizer steps over a data set of that length, which holds all its epochs."""
        return self.steps if self.steps is not None else math.ceil(length / self.batch)

    def accumulate(self, world: int) -> int:
        """Micro-batches that each of ``world`` processes adds up in a step."""
        if self.batch % (self.micro_batch * world):
            raise ValueError(
                f"optim.batch={self.batch} must be a multiple of optim.micro_batch={self.micro_batch} times "
                f"{world} processes; the nearest is {self.nearest_batch(world)}"
            )
        return self.batch // (self.micro_batch * world)

    def nearest_batch(self, world: int) -> int:
        """The batch that fits that many processes and is closest to the one asked for."""
        unit = self.micro_batch * world
        return max(1, round(self.batch / unit)) * unit

    def rate(self, step: int, steps: int) -> float:
        """The learning rate's factor at a step, counted from 0, of ``steps``."""
        warmup = math.ceil(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return (step + 1) / warmup
        left = 1 - min(1.0, (step - warmup) / max(1, steps - warmup))
        falls = {"cosine": (1 - math.cos(math.pi * left)) / 2, "linear": left, "constant": 1.0}[self.schedule]
        return self.floor + (1 - self.floor) * falls


def part_of(name: str, known: Collection[str] = PARTS) -> str:
    """The part that a parameter of that dotted name belongs to; of nested parts the innermost."""
    pieces = name.split(".")
    if pieces[-1] == "learned" or "trainable_tokens_delta" in pieces:  # m3d.models.token_rows, and peft's own
        return NEW_TOKENS
    return next((piece for piece in reversed(pieces) if piece in known), OTHER)


def parameter_groups(objective: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters by part and by whether they decay, as AdamW takes them, each group with its ``part``."""
    known = {*PARTS, *config.lr_by_part}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter, decays in _named(objective):
        groups.setdefault((part_of(name, known), decays), []).append(parameter)
    if not groups:
        raise ValueError("nothing would learn: every part of the model is frozen")
    parts = {part_of(name, known) for name, _ in objective.named_parameters()}
    for part in config.lr_by_part:
        if part not in parts:
            close = difflib.get_close_matches(part, parts, n=1) or sorted(parts)
            raise ValueError(f"optim.lr_by_part.{part}: there is no such part; there is {', '.join(close)}")
    return [
        {
            "params": parameters,
            "lr": config.lr_by_part.get(part, config.lr),
            "weight_decay": config.weight_decay if decays else 0.0,
            "part": part,
        }
        for (part, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _named(objective: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Every trainable parameter once, with its name and whether it decays."""
    seen: set[nn.Parameter] = set()
    for path, module in objective.named_modules():
        for last, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                plain = parameter.ndim < 2 or isinstance(module, nn.Embedding)
                yield f"{path}.{last}".lstrip("."), parameter, not plain and not any(t in last for t in _UNDECAYED)
