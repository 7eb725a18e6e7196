"""transformers' Trainer for objectives that return losses by name, each a sum over items that are counted.

What is minimised is what one process would minimise on the whole batch: totals are divided by counts over all
processes and micro-batches of the step. Data come in the order of the data set, each process its slice; random numbers
are seeded at every step; so a run that was killed goes on as if nothing had happened.
"""

# W = processes, A = micro-batches that a process accumulates in a step

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from data_prep.atomic import atomic_path
from m3d.train import checkpoints, engines
from m3d.train.engines import Engine, EngineName
from m3d.train.normalised import Batch, Normalised
from m3d.train.optim import OptimConfig, parameter_groups
from m3d.train.slices import Slices, seed_step
from m3d.train.watch import LossLog, Progress, Scalars, Speed, aside

__all__ = ["M3DTrainer", "OptimConfig"]

log = logging.getLogger(__name__)
HISTORY, SETTLED = 100, 20  # losses whose median is compared with, and how many there must be
_STATE = "trainer_state.json"


class M3DTrainer(Trainer):
    """Train an objective.

    Args:
        objective: Takes a batch and returns ``dict[str, Loss]``. With an attribute ``whole_batch = True`` it refuses
            accumulation, as losses do that compare all items of a batch with each other.
        dataset: Gives the item of an index, always the same; its length covers all epochs.
        collator: Items to a batch, a dict with ``ids`` and ``counts``.
        output: Folder of checkpoints, ``losses.jsonl``, scalars and ``model``.
        save: Writes the model that is shared into an empty folder, which becomes ``OUTPUT/model``: with every
            checkpoint, or only with the best where ``best`` is given. The first process calls it, with full weights.
        evaluate: Measures by name; called by every process, without gradients.
        best: The measure by which the best checkpoint is kept.
        measures: What ``evaluate`` gives, by name, and whether more of it is better.
        callbacks: More of transformers' callbacks, such as `m3d.train.watch.Samples`.
    """

    loss_is_scaled_for_ga = True  # `Normalised` has done it
    objective: nn.Module
    optimizer: Any
    lr_scheduler: Any
    model_wrapped: Any

    def __init__(
        self,
        objective: nn.Module,
        dataset: Dataset[Any],
        collator: Callable[[Sequence[Any]], Batch],
        config: OptimConfig,
        output: Path,
        engine: Engine | EngineName = "single",
        *,
        save: Callable[[Path], None] | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        best: str | None = None,
        measures: Mapping[str, bool] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        if best is not None and evaluate is None:
            raise ValueError(f"best={best!r} needs an evaluation to measure it")
        known = measures or {}
        if best is not None and best not in known:
            raise ValueError(f"best={best!r} is none of what the evaluation measures: {', '.join(sorted(known))}")
        self.engine = Engine(name=engine) if isinstance(engine, str) else engine
        self.config, self.output, self.best = config, output, best
        self.objective, self.export, self.measure = objective, save, evaluate
        self.length = len(cast("Sized", dataset))
        self.steps = config.num_steps(self.length)
        output.mkdir(parents=True, exist_ok=True)
        args = engines.arguments(
            self.engine,
            config,
            output,
            objective,
            max_steps=self.steps,
            **_flow(config, evaluate is not None, best, known.get(best or "", False)),
        )
        self.world, self.rank = engines.world(), engines.rank()
        self.accumulate = config.accumulate(self.world)
        if self.accumulate > 1 and getattr(objective, "whole_batch", False):
            raise ValueError(
                f"{type(objective).__name__} compares all items of a batch, so nothing can be accumulated: "
                f"set optim.micro_batch to {config.batch // self.world}, or use more processes or a smaller batch"
            )
        watchers = [LossLog(output), Progress(config.log_every), *callbacks]
        watchers += [Scalars(output / "tensorboard")] if Scalars.available() else []
        super().__init__(
            model=Normalised(objective),
            args=args,
            data_collator=collator,
            train_dataset=dataset,
            eval_dataset=() if evaluate is not None else None,
            callbacks=watchers,
        )
        for theirs in (PrinterCallback, ProgressCallback):
            self.remove_callback(theirs)
        self._speed, self._recent = Speed(), deque[float](maxlen=HISTORY)
        self._begin({})

    # what is done, in order

    def fit(self, *, resume: bool = False) -> None:
        """Train to the end, from the newest whole checkpoint if asked to resume.

        Raises:
            ValueError: The output holds another run, or one that cannot be gone on with in this way.
            FloatingPointError: A loss is not finite or explodes.
        """
        with checkpoints.held(self.output):
            self._fit(resume)

    def _fit(self, resume: bool) -> None:
        if self.rank == 0:
            checkpoints.sweep(self.output)
        engines.barrier()
        last = checkpoints.newest(self.output)
        if last is not None and not resume:
            raise ValueError(f"{self.output} has checkpoints up to step {last.step}: --resume, or another output")
        if last is None and resume:
            log.info("%s has no whole checkpoint: training starts from the beginning", self.output)
        if last is not None:
            checkpoints.check_same(last, self.engine.name, self.world, self.config)
            self._recent.extend(last.facts["recent"])
        try:
            self.train(resume_from_checkpoint=str(last.folder) if last else None)
        finally:
            unset_hf_deepspeed_config()  # or what is loaded afterwards would be loaded in pieces, by all processes

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:  # noqa: ANN401
        """Wrap the model, look whether the right engine did it, and put back what a checkpoint holds."""
        theirs: Any = super()._prepare_for_training  # untyped
        prepared = theirs(max_steps, train_dataloader, None)
        engines.check(self.engine, self.model_wrapped)
        if self.engine.name == "zero3":
            engines.keep_small_whole(self.model_wrapped)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        self._speed.restart()
        return prepared

    # data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This process's slices; to go on somewhere, indices are skipped and no data are read."""
        slices = Slices(
            self.length,
            steps=self.steps,
            batch=self.config.batch,
            micro_batch=self.config.micro_batch,
            rank=self.rank,
            world=self.world,
        )
        return DataLoader(
            cast("Dataset[Any]", self.train_dataset),
            batch_sampler=slices,
            collate_fn=self.data_collator,
            num_workers=self.config.workers,
            pin_memory=not self.engine.on_cpu,
            generator=torch.Generator().manual_seed(self.config.seed),
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any) -> Any:  # noqa: ANN401
        """A step's micro-batches, and the counts of all processes' together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts: dict[str, float] = {}
        for row in engines.gather([batch["counts"] for batch in batches]):
            for one in row:
                for name, value in one.items():
                    counts[name] = counts.get(name, 0) + value
        self._begin(counts)
        seed_step(self.config.seed, self.state.global_step, self.rank)
        return batches, counts

    # losses

    def _begin(self, counts: dict[str, float]) -> None:
        """A step begins."""
        self._counts: dict[str, float] = counts
        self._losses: dict[str, float] = {}
        self._seen: list[dict[str, Any]] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """This micro-batch's share of the step's loss; ``num_items_in_batch`` are the counts of the step."""
        out = model(inputs, num_items_in_batch, self.world)
        self._account({name: value.detach() for name, value in out.items()}, list(inputs["ids"]))
        return (out["loss"], out) if return_outputs else out["loss"]

    def _account(self, losses: dict[str, Tensor], ids: list[str]) -> None:
        """Add up what all processes lost, and stop all of them, before anything moves, where it went wrong."""
        values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
        values["loss"] /= self.world
        rows = engines.gather({"rank": self.rank, "ids": ids, "losses": values})
        self._seen += rows
        for row in rows:
            for name, value in row["losses"].items():
                self._losses[name] = self._losses.get(name, 0.0) + value
        broken = sorted({n for row in rows for n, value in row["losses"].items() if not math.isfinite(value)})
        if broken:
            odd = [row for row in rows if not all(map(math.isfinite, row["losses"].values()))]
            self._stop(f"loss is not finite ({', '.join(n for n in broken if n != 'loss') or 'loss'})", odd)
        if len(self._seen) == self.accumulate * self.world:
            self._check_exploding(self._losses["loss"])

    def _check_exploding(self, loss: float) -> None:
        usual = statistics.median(self._recent) if len(self._recent) >= SETTLED else math.inf
        if self.config.explode and loss > self.config.explode * usual > 0:
            self._stop(f"loss {loss:.4g} is more than {self.config.explode:g} times the usual {usual:.4g}", self._seen)
        self._recent.append(loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:  # noqa: ANN401
        """The norm before clipping, over all parameters; it, too, must be finite."""
        theirs: Any = super()._get_grad_norm  # untyped
        norm = theirs(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            self._stop("the gradient is not finite", self._seen)
        return norm

    def _stop(self, why: str, rows: list[dict[str, Any]]) -> None:
        """Write what was being looked at, and end."""
        step, path = self.state.global_step + 1, self.output / "stopped.json"
        if self.rank == 0:
            facts = {"step": step, "why": why, "usual": list(self._recent)[-SETTLED:], "batches": rows}
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        engines.barrier()
        raise FloatingPointError(
            f"step {step}: {why}; the batch's ids and losses are in {path}; look at them, lower optim.lr, then --resume"
        )

    # optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:  # noqa: ANN401
        """AdamW over groups by part."""
        if self.optimizer is None:
            groups = parameter_groups(self.objective, self.config)
            fused = not self.engine.on_cpu and self.engine.name != "fsdp"
            self.optimizer = torch.optim.AdamW(groups, lr=self.config.lr, betas=self.config.betas, fused=fused)
        made: torch.optim.Optimizer = self.optimizer
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:  # noqa: ANN401
        """The schedule of the configuration, alike for all groups."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda step: self.config.rate(step, num_training_steps)
            )
            self._created_lr_scheduler = True
        made: LambdaLR = self.lr_scheduler
        return made

    # logs

    def _get_learning_rate(self) -> float:
        """The base rate; Trainer asks after the optimizer's step and before the schedule's."""
        rates = zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True)
        self._rates = {f"lr/{group.get('part', 'all')}": float(rate) for group, rate in rates}
        return self.config.lr * self.config.rate(self.state.global_step, self.steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's row: loss, losses by name, the gradient's norm, learning rates, speed and memory."""
        if "loss" in logs:
            norm = logs.get("grad_norm")
            row = {"loss": self._losses["loss"], **self._losses}
            row |= {} if norm is None else {"grad_norm": float(norm)}
            row |= {"lr": logs["learning_rate"], **self._rates}
            logs = row | self._speed.row(self.config.batch, self._counts)
        super().log(logs, start_time)
        del self.state.log_history[:-HISTORY]  # losses.jsonl has it all

    # evaluation and checkpoints

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:  # noqa: ANN401
        """Measure; all processes go by what the first one found."""
        assert self.measure is not None
        with aside(self.objective), engines.at_hand(self.model_wrapped):
            measured = {f"eval_{name}": float(value) for name, value in self.measure().items()}
        metrics: dict[str, float] = engines.gather(measured)[0]
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._speed.restart()
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:  # noqa: ANN401
        """A new best is saved at once."""
        better = bool(super()._determine_best_metric(metrics, trial))
        self.control.should_save |= better
        return better

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ANN401
        """Write all that is needed to go on, then remove what is too old."""
        step, best = self.state.global_step, self.state.best_global_step
        if best:
            self.state.best_model_checkpoint = str(self.output / f"checkpoint-{best}")
        if self.best is None or best == step:
            self._export()
        config = asdict(self.config)
        facts = {"engine": self.engine.name, "world": self.world, "config": config, "recent": list(self._recent)}
        with checkpoints.writing(self.output, step, facts) as folder:
            self._write_state(folder)
        if self.rank == 0:
            checkpoints.rotate(self.output, keep=self.config.keep, best=best)
        engines.barrier()
        self._speed.restart()

    def _export(self) -> None:
        """Write the model that is shared."""
        if self.export is None:
            return
        with aside(self.objective), engines.whole_weights(self.objective, self.engine):
            if self.rank == 0:
                with checkpoints.replacing(self.output / "model") as folder:
                    self.export(folder)
            engines.barrier()

    def _write_state(self, folder: Path) -> None:
        if self.engine.zero_stage:
            self.model_wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=True)
        elif self.engine.name == "fsdp":
            super()._save_optimizer_and_scheduler(str(folder))
        elif self.rank == 0:
            checkpoints.write_learned(self.objective, folder)
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        if self.rank == 0:
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
            self.state.save_to_json(str(folder / _STATE))

    def _restore(self, folder: Path) -> None:
        """Put back weights, optimizer and schedule; step and best come from Trainer's own state."""
        if self.engine.zero_stage:
            loaded, _ = self.model_wrapped.load_checkpoint(
                str(folder), load_module_strict=False, load_lr_scheduler_states=False
            )
            if loaded is None:
                raise OSError(f"{folder}: DeepSpeed found nothing to load; remove the folder to use the one before")
        elif self.engine.name == "fsdp":
            super()._load_from_checkpoint(str(folder), self.model_wrapped)
            super()._load_optimizer_and_scheduler(str(folder))
        else:
            checkpoints.read_learned(self.objective, folder)
            stored = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(stored)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ANN401
        """Nothing: `_restore` does it, when the model is wrapped."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: every step is seeded anew."""


def _flow(config: OptimConfig, evaluates: bool, best: str | None, greater: bool) -> dict[str, Any]:
    """When Trainer does what."""
    every: Literal["steps", "no"] = "steps" if evaluates else "no"
    return {
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.save_every,
        "eval_strategy": every,
        "eval_steps": config.eval_every or config.save_every,
        "metric_for_best_model": best,
        "greater_is_better": None if best is None else greater,
        "report_to": [],
        "remove_unused_columns": False,
        "label_names": [],
        "disable_tqdm": True,
    }
