"""Fine-tune on your own folder in nnU-Net's layout: one command, from a checkpoint to one that knows your structures.

``m3d train configs/segvol/finetune.yaml folder=FOLDER``. The folder becomes a store, on the checkpoint's own grid; some
patients are held out, and what is drawn of them is measured before and after. What learns is the whole model, so that
it draws new structures by their names too: ``m3d segment ct.nii.gz "my structure" --model OUTPUT``. A mask head with a
text tower (of pretrain_segvol, or a converted SegVol) learns alone, and has read any name from the start.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.atomic import atomic_path
from data_prep.preprocess import Preprocess
from data_prep.sources.base import Entry
from data_prep.store import Store
from m3d.inference.checkpoints import HEAD, kind_of
from m3d.recipes import instruct, pretrain_segvol
from m3d.recipes.build import Init
from m3d.recipes.checkpoints import fingerprint
from m3d.recipes.own_folder import checkpoint_folder, entries_of, prepare_folder
from m3d.recipes.parts import Parts
from m3d.recipes.registry import recipe
from m3d.recipes.talk import ExchangesConfig
from m3d.train import engines
from m3d.train.augment import Augment
from m3d.train.engines import Engine
from m3d.train.objective import LossWeights
from m3d.train.optim import OptimConfig

log = logging.getLogger(__name__)

HELD_OUT = "held_out.json"
WEIGHTS = {"seg.sem": 3.0, "rec.box3d": 1.0}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything the stage can be told.

    Attributes:
        folder: The data set: ``dataset.json``, ``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz``.
        source: Options of the source `nnunet`: ``channel``, ``rename``, ``patients``, ``modality``, ``complete``...
        checkpoint: A bundled model, a whole model's folder or a mask head's, or the output of a stage that left one.
        held_out: Share of the patients that are measured on, at least two of them.
        most_measured: Scans that are drawn on before and after.
        stores: Stores to learn from beside the folder, prepared as the checkpoint was, so that what it knew stays.
        shares: How often their images are shown in an epoch.
        exchanges: How many are drawn for a volume; of a mask head, structures.
        simulated: Masks of a volume that are drawn from clicks and boxes too.
        weights: How often each task is drawn; the folder itself has seg.sem and rec.box3d. A mask head only draws.
        parts: Which parts of a whole model learn, and how.
        best: None keeps the last; a measure lets the patients held out choose the model whose Dice on them is told.
    """

    stage: Literal["finetune"] = "finetune"
    output: str = "runs/finetune"
    seed: int = 0
    folder: str
    source: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = "m3d-tiny"
    held_out: float = 0.2
    most_measured: int = 16
    stores: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    exchanges: int = 8
    simulated: int = 2
    weights: dict[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    parts: Parts = field(default_factory=instruct.published_parts)
    loss: LossWeights = field(default_factory=LossWeights)
    augment: Augment | None = field(default_factory=Augment)
    optim: OptimConfig = field(default_factory=instruct.published_optim)
    best: str | None = None
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        self.optim.refuse_seed()
        if not 0 < self.held_out < 1 or self.most_measured < 1:
            raise ValueError(
                f"held_out={self.held_out} must be between 0 and 1, and most_measured={self.most_measured} 1 or more"
            )
        if self.shares and len(self.shares) != len(self.stores):
            raise ValueError(f"shares has {len(self.shares)} numbers for {len(self.stores)} stores")

    @property
    def store(self) -> Path:
        """Where the folder is prepared to."""
        return Path(self.output) / "store"

    def parents(self) -> dict[str, str | None]:
        """The folder that it begins from."""
        return {"checkpoint": str(checkpoint_folder(self.checkpoint))}

    def learning(self) -> instruct.Config | pretrain_segvol.Config:
        """The stage that learns from the prepared folder: instruction, or of a mask head its own.

        Raises:
            ValueError: The checkpoint is neither a whole model nor a mask head.
        """
        folder = checkpoint_folder(self.checkpoint)
        judged = None if any(map(_nothing_to_judge, self.stores)) else "validation"
        if judged is None and self.best is not None:
            raise ValueError(f"best={self.best}, but a store has no validation split; best=null keeps the last")
        stores, shares = (str(self.store), *self.stores), (1.0, *self.shares) if self.shares else ()
        shared: dict[str, Any] = {
            "output": self.output,
            "seed": self.seed,
            "loss": self.loss,
            "augment": self.augment,
            "optim": self.optim,
            "best": self.best,
            "engine": self.engine,
        }
        if (kind := kind_of(folder)) == HEAD:
            masks = pretrain_segvol.MasksConfig(stores=stores, shares=shares, judged=judged, masks=self.exchanges)
            return pretrain_segvol.Config(data=masks, checkpoint=str(folder), **shared)
        if kind != "m3d":
            raise ValueError(f"checkpoint={self.checkpoint} holds a {kind!r} model; a whole model or a head is needed")
        data = ExchangesConfig(
            stores=stores,
            shares=shares,
            judged=judged,
            weights=self.weights,
            exchanges=self.exchanges,
            whole_first=True,
            simulated=self.simulated,
        )
        return instruct.Config(data=data, init=Init(checkpoint=str(folder)), parts=self.parts, **shared)


def _nothing_to_judge(root: str) -> bool:
    """Whether a store has no validation split; one that is not there yet may have."""
    if not (Path(root) / "store.json").is_file():
        return False
    return all(image.split != "validation" for image in Store(root).images.values())


def main(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Prepare the folder, measure, learn, and measure again; the manifest of what came of it."""
    folder, stage = checkpoint_folder(config.checkpoint), config.learning()
    engines.prepare(config.engine)
    entries = entries_of(config.folder, config.source, config.held_out)
    held = [entry for entry in entries if entry.split == "validation"][: config.most_measured]
    if engines.rank() == 0:
        prepare_folder(entries, Preprocess.read(folder), config.store, seed=config.seed)
        _measure(config, "before", folder, held)
    engines.barrier()
    manifest: Any = recipe(stage.stage).main(stage, resume=resume)
    if engines.rank() == 0:
        _measure(config, "after", Path(config.output) / "model", held)
        log.info("%s", table(json.loads((Path(config.output) / HELD_OUT).read_text(encoding="utf-8"))))
    engines.barrier()
    return dict(manifest)


def _measure(config: Config, when: str, folder: Path, held: Sequence[Entry]) -> None:
    """Add what a checkpoint draws of the scans that were held out to ``held_out.json``.

    What was drawn before stays, where it was by the same checkpoint and of the same scans.

    Raises:
        ValueError: None of the scans has a contour.
    """
    from m3d.inference.load import load
    from m3d.recipes.held_out import measure, summary

    path = Path(config.output) / HELD_OUT
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    facts = {"cases": [entry.image_id for entry in held], "checkpoint": fingerprint(folder)}
    if when == "before" and facts.items() <= found.get(when, {}).items():
        return
    log.info("%s: drawing on %d scans that were held out", when, len(held))
    drawn = summary(measure(load(folder, device=config.engine.device), held))
    if not drawn["structures"]:
        raise ValueError(
            f"folder={config.folder}: none of the {len(held)} scans held out has a contour to measure on; "
            f"raise held_out={config.held_out} or most_measured={config.most_measured}, or give contours to them"
        )
    found[when] = {**facts, **drawn}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table(found: dict[str, Any]) -> str:
    """Dice before and after, in a few lines."""
    before, after = found["before"], found["after"]
    if not before["structures"] or not after["structures"]:
        return "No structure of the scans that were held out has a contour: nothing was measured."
    rows = {**after["structures"], "mean": after["mean"]}
    lines = ["Dice on scans that were held out, before -> after, by name, by a click, by a box:"]
    for name, now in rows.items():
        was = before["structures"].get(name, before["mean"])
        words = ", ".join(f"{was[by]:.2f} -> {now[by]:.2f}" for by in ("name", "click", "box"))
        lines.append(f"  {name}: {words}" + (f" (n={now['n']})" if "n" in now else ""))
    return "\n".join(lines)
