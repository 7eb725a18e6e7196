"""A MONAI SegResNet that does nothing but segment, trained as long as the model: how well masks can be learned here.

    python benchmarks/segresnet_reference.py --data PATH/openkbp --stores STORE [STORE ...] --minutes M [--bf16]

It learns from the same stores, on the same grid and with the same augmentation as the model's own mask head, with
MONAI's DiceCELoss and AdamW, and is measured as the model is: hard Dice on the scan's own grid, which logits reach on
the way that `m3d.Scan` takes. A structure that nobody contoured is unknown, not absent: each has a sigmoid of its own,
and only those that are known are learned. Every five minutes it is kept in ``runs/segresnet``, from where the same
command goes on. No patient that it is measured on chooses anything: the last weights are taken. Writes
``benchmarks/results/segresnet_reference.json``.
"""

# B = volumes, S = the seven structures, K = known ones of a batch, (D, H, W) = the stores' grid

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import m3d  # noqa: F401  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import numpy as np
import torch
from monai.losses.dice import DiceCELoss
from monai.networks.nets.segresnet import SegResNet
from scoring import Row, mask_row, score
from tiny_accuracy import HOME, RESULTS, machine_facts, write_result
from torch import Tensor, nn
from tqdm import tqdm

from data_prep.atomic import atomic_path
from data_prep.openkbp import NAMES, cases, read_case
from data_prep.preprocess import Preprocess
from m3d.bench.bootstrap import RESAMPLES, SEED
from m3d.recipes.checkpoints import data_facts
from m3d.recipes.preflight import check_stores
from m3d.train.augment import Augment
from m3d.train.cases import TrainingCase, stored
from m3d.train.data import Group, VolumeDataset
from m3d.train.views import Look, moved

STRUCTURES = tuple(NAMES.values())
WORK = HOME / "runs" / "segresnet"
KEEP_EVERY = 300.0  # seconds
OUTSIDE = -30.0  # a logit where the crop cut away, as in m3d.Scan
RARE = -5.0  # sigmoid: 0.7 %, between an esophagus and a mandible
NO_END = 10**9


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What changes the result; ``minutes`` of training, whatever else the machine does."""

    minutes: float
    filters: int = 16
    batch: int = 2
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.02
    bf16: bool = False
    seed: int = 0
    shares: tuple[float, ...] = ()

    def rate(self, done: float) -> float:
        """The learning rate's factor when this share of the time is over: up quickly, then down a cosine."""
        if done < self.warmup:
            return max(done / self.warmup, 0.01)
        left = (1 - min(done, 1.0)) / (1 - self.warmup)
        return (1 - math.cos(math.pi * left)) / 2


# -- what is learned ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Contoured:
    """A volume ``(1, D, H, W)``, masks of all structures ``(S, D, H, W)``, and which of these are known ``(S,)``."""

    pixels: Tensor
    masks: Tensor
    known: Tensor


@dataclass(frozen=True, kw_only=True)
class Contours:
    """A view of a case: all its structures at once."""

    augment: Augment | None = field(default_factory=Augment)

    def wants(self, case: TrainingCase) -> bool:
        """Whether the case has any of the structures."""
        return case.image.masks is not None and bool(set(STRUCTURES) & set(case.image.names.values()))

    def size(self, case: TrainingCase, rng: Any) -> int:
        """All volumes are alike."""
        return 1

    def show(self, look: Look) -> Contoured:
        """Move the picture with its labels; what is known was known before."""
        values = {name: value for value, name in look.case.image.names.items()}
        there = set(np.unique(look.arrays[1]).tolist())
        known = [name in values and (values[name] in there or look.case.image.complete) for name in STRUCTURES]
        shown = moved(look, list(values), self.augment)
        empty = torch.zeros(shown.image.shape, dtype=torch.bool)
        masks = [look.case.mask(shown.labels, name) if name in values else empty for name in STRUCTURES]
        return Contoured(shown.image[None], torch.stack(masks), torch.tensor(known))


def known_loss(logits: Tensor, masks: Tensor, known: Tensor) -> Tensor:
    """MONAI's DiceCELoss over the known structures, each a volume of its own: ``(B, S, D, H, W)``, ``(B, S)``."""
    if not bool(known.any()):
        return logits.sum() * 0
    loss: Tensor = DiceCELoss(sigmoid=True)(logits[known][:, None].float(), masks[known][:, None].float())
    return loss


def build(settings: Settings) -> SegResNet:
    """MONAI's network as its authors have it (Myronenko 2018), ``filters`` wide at full resolution.

    It begins with the logit of a rare voxel, as the model's own head does: from 0 it would first spend hundreds of
    steps on learning that most of a scan is background.
    """
    torch.manual_seed(settings.seed)
    network = SegResNet(
        spatial_dims=3,
        init_filters=settings.filters,
        in_channels=1,
        out_channels=len(STRUCTURES),
        blocks_down=(1, 2, 2, 4),
        blocks_up=(1, 1, 1),
    )
    nn.init.constant_(network.conv_final[-1].conv.bias, RARE)
    return network


# -- training -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training: how far it is, and how to keep it and go on."""

    settings: Settings
    network: SegResNet
    optimizer: torch.optim.Optimizer
    facts: dict[str, Any]
    step: int = 0
    seconds: float = 0.0
    loss: float = float("nan")

    def keep(self, folder: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "facts": self.facts,
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_path(folder / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def go_on(self, folder: Path) -> None:
        """Take over a checkpoint, if there is one.

        Raises:
            ValueError: It is that of other settings or other data.
        """
        path = folder / "checkpoint.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        if state["facts"] != self.facts:
            raise ValueError(f"{path} is of other settings or other data; move it away, or give another --work")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.loss = state["step"], state["seconds"], state["loss"]


def begin(settings: Settings, stores: Sequence[Path]) -> Run:
    """A training that has not made a step."""
    network = build(settings)
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay)
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(settings).items()}
    return Run(settings, network, optimizer, {"settings": given, "data": data_facts(stores)})


def batches(dataset: VolumeDataset[Contoured], batch: int, step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches from a step on, without end; an item hangs on the seed and its index alone."""
    while True:
        items = [dataset[step * batch + number] for number in range(batch)]
        yield (
            torch.stack([item.pixels for item in items]),
            torch.stack([item.masks for item in items]),
            torch.stack([item.known for item in items]),
        )
        step += 1


def train(run: Run, dataset: VolumeDataset[Contoured], folder: Path) -> None:
    """Learn until the time is over, reading included; the time before a stop counts up to the last checkpoint."""
    settings, end = run.settings, run.settings.minutes * 60
    device = next(run.network.parameters()).device
    kept = began = time.monotonic() - run.seconds
    bar = tqdm(total=round(end), initial=round(run.seconds), unit="s", desc="SegResNet")
    run.network.train()
    for pixels, masks, known in batches(dataset, settings.batch, run.step):
        if run.seconds >= end:
            break
        for group in run.optimizer.param_groups:
            group["lr"] = settings.lr * settings.rate(run.seconds / end)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            logits = run.network(pixels.to(device))
        loss = known_loss(logits, masks.to(device), known.to(device))
        run.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(run.network.parameters(), 1.0)
        run.optimizer.step()
        run.step, run.loss = run.step + 1, loss.item()
        run.seconds = time.monotonic() - began
        bar.update(round(run.seconds) - bar.n)
        bar.set_postfix(step=run.step, loss=f"{run.loss:.3f}")
        if time.monotonic() - kept > KEEP_EVERY:
            run.keep(folder)
            kept = time.monotonic()
    bar.close()
    run.keep(folder)


# -- measuring ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def examine(network: nn.Module, preprocess: Preprocess, folder: Path) -> list[Row]:
    """A patient's rows, as `tiny_accuracy` has them of masks by name."""
    case = read_case(folder)
    prepared = preprocess.apply(case.volume)
    pixels = torch.from_numpy(np.ascontiguousarray(prepared.array))[None, None]
    logits = network(pixels.to(next(network.parameters()).device))[0].float().cpu().numpy()
    rows: list[Row] = []
    for name in case.present:
        guess = prepared.to_scan(logits[STRUCTURES.index(name)], order=1, fill=OUTSIDE) > 0
        row = mask_row(guess, case.mask(name), case.volume.spacing)
        rows.append({"patient": case.id, "sight": "seeing", "task": "dice", "item": name, **row})
    return rows


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HOME.parent / "shared" / "data" / "openkbp")
    parser.add_argument("--stores", type=Path, nargs="+", default=[Path("stores/openkbp"), Path("stores/phantoms")])
    parser.add_argument("--shares", type=float, nargs="+", help="how often an epoch shows each store; 1 if not given")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, help="of the CPU; all if not given")
    parser.add_argument("--filters", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="measure the first patients only")
    parser.add_argument("--work", type=Path, default=WORK, help="where checkpoints are kept")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.shares = given.shares or [1.0] * len(given.stores)
    if len(given.shares) != len(given.stores):
        parser.error(f"--shares {given.shares} must be one for each of {len(given.stores)} stores")
    return given


def main() -> None:
    """Train, measure, write."""
    given = read_arguments()
    missing = [path for path in (given.data, *given.stores) if not path.is_dir()]
    if missing:
        print(f"{missing[0]} is not here: give --data PATH/openkbp and --stores; nothing measured")
        return
    torch.set_flush_denormal(True)
    if given.threads:
        torch.set_num_threads(given.threads)
    preprocess = check_stores(given.stores)
    assert preprocess is not None  # there is a store
    named = {name: getattr(given, name) for name in ("minutes", "filters", "batch", "lr", "bf16", "seed")}
    settings = Settings(**named, shares=tuple(given.shares))
    groups = [
        Group(cases=stored(root, "train", preprocess=preprocess), weight=share, name=root.name)
        for root, share in zip(given.stores, given.shares, strict=True)
    ]
    dataset = VolumeDataset(groups, Contours(), seed=settings.seed, length=NO_END, cache_bytes=2**30)
    run = begin(settings, given.stores)
    run.network.to("cuda" if torch.cuda.is_available() else "cpu")
    run.go_on(given.work)
    train(run, dataset, given.work)
    run.network.eval()
    folders = cases(given.data, "validation")[: given.limit]
    rows = [row for folder in tqdm(folders, unit="patient") for row in examine(run.network, preprocess, folder)]
    result = {
        "command": "python benchmarks/segresnet_reference.py",
        "model": "MONAI SegResNet",
        "parameters": sum(parameter.numel() for parameter in run.network.parameters()),
        **run.facts,
        "steps": run.step,
        "volumes": run.step * settings.batch,
        "seconds": round(run.seconds),
        "last_loss": run.loss,
        "patients": len(folders),
        "bootstrap": {"over": "patients", "resamples": RESAMPLES, "seed": SEED, "interval": 0.95},
        **machine_facts(),
        "metrics": score(rows),
    }
    limited = given.work / f"segresnet_first_{given.limit}.json"
    write_result(given.out or (limited if given.limit else RESULTS / "segresnet_reference.json"), result)
    (given.work / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
