"""What alignment and instruction share: exchanges about volumes, a model built from parts, and how it is judged."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from data_prep.preprocess import Preprocess
from m3d.models import M3DForConditionalGeneration, M3DSegConfig
from m3d.recipes.build import Built, Init, build
from m3d.recipes.checkpoints import begin_manifest, begun, finish_manifest, model_folder, write_manifest, write_recipe
from m3d.recipes.handover import Kind, kind_of, save_model
from m3d.recipes.parts import Parts, apply
from m3d.recipes.preflight import check_stores
from m3d.tasks import check_tasks
from m3d.tasks.codecs import Frac3
from m3d.train import engines
from m3d.train.anchors import Anchors
from m3d.train.augment import Augment
from m3d.train.cases import TrainingCase, stored
from m3d.train.collate import Collator
from m3d.train.data import Group, VolumeDataset, names_in
from m3d.train.drawing import language_vectors
from m3d.train.engines import Engine
from m3d.train.kept_tokens import refuse_large, still
from m3d.train.objective import LossWeights, TalkAndDraw
from m3d.train.optim import OptimConfig
from m3d.train.spread import Moments
from m3d.train.trainer import M3DTrainer
from m3d.train.views import Exchanges, View
from m3d.train.watch import Samples

log = logging.getLogger(__name__)

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class StoresConfig:
    """Which scans: stores of ``m3d data prepare``, all prepared alike.

    Attributes:
        stores: Their folders.
        shares: How often each store's images are shown in an epoch; once where it is not given.
        split: Learned from.
        judged: Measured on at every evaluation; None for no measuring.
        most_judged: Images measured on, dealt out among the stores.
        cache_gib: Volumes that each process keeps in memory.
    """

    stores: tuple[str, ...]
    shares: tuple[float, ...] = ()
    split: str = "train"
    judged: str | None = "validation"
    most_judged: int = 16
    cache_gib: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what names nothing."""
        if not self.stores:
            raise ValueError("data.stores is empty; name at least one store of `m3d data prepare`")
        if self.shares and len(self.shares) != len(self.stores):
            raise ValueError(f"data.shares has {len(self.shares)} numbers for {len(self.stores)} stores")
        if self.most_judged < 2:
            raise ValueError(f"data.most_judged={self.most_judged} must be 2 or more: the spread of tokens needs two")

    def check_samples(self, every: int | None) -> None:
        """Refuse sample predictions (``samples_every``) of nothing, or every no steps."""
        if every is not None and every < 1:
            raise ValueError(f"samples_every={every} must be 1 or more; null writes none")
        if every is not None and self.judged is None:
            raise ValueError(f"samples_every={every} needs volumes to show: set data.judged")

    def groups(self) -> list[Group]:
        """The cases to learn from."""
        shares = self.shares or (1.0,) * len(self.stores)
        return [
            Group(cases=stored(root, self.split), weight=share, name=Path(root).name)
            for root, share in zip(self.stores, shares, strict=True)
        ]

    def judged_groups(self) -> list[Group]:
        """The first cases of each store's split to measure on."""
        if self.judged is None:
            return []
        most = -(-self.most_judged // len(self.stores))
        return [Group(cases=stored(root, self.judged)[:most], name=Path(root).name) for root in self.stores]

    def preprocess(self) -> Preprocess:
        """How the stores were prepared.

        Raises:
            ValueError: Not alike.
        """
        found = check_stores([Path(root) for root in self.stores])
        assert found is not None  # there is a store
        return found


@dataclass(frozen=True, kw_only=True)
class ExchangesConfig(StoresConfig):
    """And what is said of them.

    Attributes:
        weights: How often each task is drawn.
        exchanges: How many are drawn for a volume.
        max_tokens: Of a volume's packed row.
        max_length: Of one exchange, its volume included.
        whole_first: Begin with the record that asks for most masks.
        most: Masks that other segmentation exchanges ask for at most.
        packing: One row for the exchanges of a volume, which is shown once.
        simulated: Masks of a volume that are drawn from clicks and boxes too.
        window: Volumes within which those with rows of similar length are brought together.
        looks: In how many ways each volume is varied; 0 for anew at every visit. Where the tower stands still and
            nothing is drawn, it looks at each such picture once and its tokens stay in memory, 2 bytes a number.
        measured: Share of the answers that draw and measure what they rest on first, where the record has evidence.
        unseen: Share of these in which the masks show nothing, so that an answer does without values, too.
    """

    weights: dict[str, float] = field(default_factory=dict)
    exchanges: int = 8
    max_tokens: int | None = None
    max_length: int | None = 512
    whole_first: bool = False
    most: int = 2
    packing: bool = True
    simulated: int = 0
    window: int = 0
    looks: int = 0
    measured: float = 0.0
    unseen: float = 0.0

    def __post_init__(self) -> None:
        """Refuse tasks that are none."""
        super().__post_init__()
        check_tasks(self.weights, "data.weights")


@dataclass(frozen=True, kw_only=True)
class TalkConfig:
    """Everything that alignment and instruction can be told; each has its own defaults.

    Attributes:
        init: Where the parts come from.
        parts: Which of them learn, and how.
        loss: Weights of the losses.
        augment: How volumes are varied, as far as the texts stay true.
        saved: "whole" (LoRA folded in), or "parts": without the language model, which stays in its own folder.
        best: The measure by which the best model is kept, "loss" for instance; None keeps the last.
        checkpointing: Trade a second forward pass for the activations of ViT and language model.
        samples_every: Steps between sample predictions; None for none.
        engine: One process or many.
    """

    stage: str
    output: str
    seed: int = 0
    data: ExchangesConfig
    init: Init
    parts: Parts = field(default_factory=Parts)
    loss: LossWeights = field(default_factory=LossWeights)
    augment: Augment | None = field(default_factory=Augment)
    optim: OptimConfig
    saved: Kind = "whole"
    best: str | None = None
    checkpointing: bool = False
    samples_every: int | None = None
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        """Refuse what could not be loaded again, and what would be passed over."""
        self.optim.refuse_seed()
        if self.saved == "parts" and self.init.language_model is None:
            raise ValueError("saved=parts leaves the language model where it is: give its folder, init.language_model")
        self.data.check_samples(self.samples_every)
        half = self.init.dtype == "bfloat16" and not (self.engine.zero_stage and self.optim.bf16)
        if half and self.parts.language_model == "full":
            raise ValueError(
                "parts.language_model=full with init.dtype=bfloat16: its small steps would be rounded away; take "
                "init.dtype=float32, or engine zero2 or zero3 with optim.bf16, which keep a float32 copy"
            )
        if self.data.looks and self.engine.in_pieces:
            raise ValueError(f"data.looks with engine={self.engine.name}: its parts are fetched by all at once; take 0")
        if self.saved == "parts" and self.parts.language_model == "full":
            raise ValueError("parts.language_model=full changes all of its weights; use saved=whole")

    def parents(self) -> dict[str, str | None]:
        """The folders that it begins from."""
        return self.init.parents


def run(config: TalkConfig, *, resume: bool = False) -> dict[str, Any]:
    """Build the model, let its parts learn from exchanges, save what came of it; the manifest."""
    engines.prepare(config.engine)
    preprocess = config.data.preprocess()
    torch.manual_seed(config.seed)
    built = build(config.init, preprocess)
    _check_kind(config)
    learning = apply(built.model, config.parts, boxes=config.loss.boxes > 0)
    if config.checkpointing:
        built.model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
        built.model.vision_tower.gradient_checkpointing = True
    objective = TalkAndDraw(built.model, config.loss, anchors_of(config, built))
    if objective.draws:
        _learn_names(built.model.config.seg, names_in(config.data.groups()))
    if config.data.looks and still(built.model.vision_tower) and not objective.draws:
        vision, shown = built.model.config.vision, sum(len(group.cases) for group in config.data.groups())
        refuse_large(shown, config.data.looks, math.prod(vision.grid), vision.hidden_size)
    optim = replace(config.optim, seed=config.seed)
    collate = Collator(
        processor=built.processor,
        packing=config.data.packing,
        simulated=config.data.simulated if objective.draws else 0,
        global_batch=optim.batch,
    )
    judge = judge_of(
        config.data,
        exchanges(config, built, None),
        collate,
        objective,
        built.model,
        optim,
        together=config.engine.in_pieces,
    )
    facts = {name: {"learned": one.learned, "total": one.total} for name, one in learning.items()}
    return train(
        config,
        objective,
        dataset(config.data, exchanges(config, built, config.augment), optim, config.seed),
        collate,
        optim,
        save=lambda folder: save_model(folder, built.model, built.processor, kind=config.saved, lora=config.parts.lora),
        judge=judge,
        measures=judge.measures if judge is not None else None,
        callbacks=samples(config, objective, _sheet(config, built)),
        facts={"parts": facts, "kind": config.saved, "from": built.notes},
        resume=resume,
    )


def _learn_names(seg: M3DSegConfig | None, names: Sequence[str]) -> None:
    """Those that a checkpoint had learned keep their places, which are the values of its label maps."""
    assert seg is not None
    seg.vocabulary = list(dict.fromkeys([*(seg.vocabulary or []), *names]))


def anchors_of(config: TalkConfig, built: Built) -> Anchors | None:
    """What the language model says of the stores' names before it learns, where ``loss.anchor`` holds it to that."""
    if config.loss.anchor == 0:
        return None
    model = built.model.eval()  # type: ignore[no-untyped-call]
    if model.seg_projector is None:
        raise ValueError("loss.anchor needs a model with a mask head; set it to 0")
    names = names_in(config.data.groups())
    said = language_vectors(model.language_model, built.processor.tokenizer, names)
    with torch.no_grad():
        prompts = model.seg_projector(said.vectors.to(model.device, model.seg_projector[0].weight.dtype)).float()
    model.train()
    return Anchors(said.index, prompts)


def _check_kind(config: TalkConfig) -> None:
    checkpoint = config.init.checkpoint
    if config.saved == "parts" and checkpoint is not None and kind_of(model_folder(checkpoint)) == "whole":
        raise ValueError(
            f"{checkpoint} has a language model of its own, which saved=parts would leave out; "
            "save that stage with saved=parts too, or this one with saved=whole"
        )


def exchanges(config: TalkConfig, built: Built, augment: Augment | None) -> Exchanges:
    """What is drawn of a case."""
    data = config.data
    return Exchanges(
        processor=built.processor,
        codec=Frac3(),
        weights=data.weights,
        augment=augment,
        exchanges=data.exchanges,
        max_tokens=data.max_tokens,
        max_length=data.max_length,
        whole_first=data.whole_first,
        most=data.most,
        looks=data.looks if augment is not None else 1,
        measured=data.measured,
        unseen=data.unseen,
    )


def dataset(data: StoresConfig, view: View[Any], optim: OptimConfig, seed: int) -> VolumeDataset[Any]:
    """The volumes of the split, for as many steps or epochs as are asked for."""
    return VolumeDataset(
        data.groups(),
        view,
        seed=seed,
        epochs=optim.epochs or 1,
        length=None if optim.steps is None else optim.steps * optim.batch,
        window=getattr(data, "window", 0),
        chunk=optim.batch,
        cache_bytes=int(data.cache_gib * GIB),
    )


# -- judging --------------------------------------------------------------------------------------------------------

Collate = Callable[[Sequence[Any]], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Judge:
    """Losses on volumes that are not learned from, always the same, and how far the tower tells them apart.

    ``look`` maps volumes to the tower's tokens; ``loss`` is the weighted sum that training minimises. Processes deal
    the volumes out among them, except where they hold pieces of the weights (``together``): there, all look at all.
    """

    objective: nn.Module
    items: VolumeDataset[Any]
    collate: Collate
    look: Callable[[Tensor], Tensor]
    optim: OptimConfig
    together: bool = False

    def __post_init__(self) -> None:
        """Refuse too few volumes, now and not after hours."""
        if len(self.items) < 2:
            raise ValueError(
                f"data.judged: {len(self.items)} volume to measure on, but whether the tower tells volumes apart takes "
                "two; prepare more of that split, or set data.judged=null"
            )

    @property
    def measures(self) -> dict[str, bool]:
        """What may be measured, by name, and whether more of it is better: of losses it is not."""
        losses = ("loss", *cast("tuple[str, ...]", self.objective.loss_names))
        return dict.fromkeys(losses, False) | {"token_spread": True}

    def __call__(self) -> dict[str, float]:
        """Measure."""
        device = next(self.objective.parameters()).device
        totals: dict[str, list[float]] = {}
        seen = Moments()
        size, rank, world = self.optim.micro_batch, engines.rank(), engines.world()
        first, stride = (0, size) if self.together else (rank * size, world * size)
        for start in range(first, len(self.items), stride):
            numbers = range(start, min(start + size, len(self.items)))
            batch = to_device(self.collate([self.items[number] for number in numbers]), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.optim.bf16):
                seen.add(self.look(batch["pixel_values"]))
                losses = self.objective(batch)
            for name, loss in losses.items():
                found = totals.setdefault(name, [0.0, 0.0, loss.weight])
                found[0] += float(loss.total)
                found[1] += batch["counts"][loss.count]
        if not self.together:
            totals, seen = _joined(engines.gather((totals, seen)))
        means = {name: (total / count, weight) for name, (total, count, weight) in totals.items() if count}
        row = {"loss": sum(mean * weight for mean, weight in means.values())}
        return row | {name: mean for name, (mean, _) in means.items()} | {"token_spread": seen.spread()}


def _joined(rows: Sequence[tuple[dict[str, list[float]], Moments]]) -> tuple[dict[str, list[float]], Moments]:
    """Totals, counts and weights by name, and moments, of all processes."""
    totals: dict[str, list[float]] = {}
    for own, _ in rows:
        for name, (total, count, weight) in own.items():
            found = totals.setdefault(name, [0.0, 0.0, weight])
            found[0] += total
            found[1] += count
    return totals, Moments.of(moments for _, moments in rows)


def judge_of(
    data: StoresConfig,
    view: View[Any],
    collate: Collate,
    objective: nn.Module,
    model: M3DForConditionalGeneration,
    optim: OptimConfig,
    *,
    together: bool,
) -> Judge | None:
    """How the whole model is judged, or None."""
    if data.judged is None:
        return None
    items = VolumeDataset(data.judged_groups(), view, seed=0)
    tower = model.vision_tower

    def look(pixels: Tensor) -> Tensor:
        return tower.patches(pixels.to(tower.norm.weight.dtype))

    return Judge(objective, items, collate, look, optim, together)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


# -- training -------------------------------------------------------------------------------------------------------


def train(
    config: Any,  # noqa: ANN401 - any trained stage's dataclass
    objective: nn.Module,
    items: VolumeDataset[Any],
    collate: Collate,
    optim: OptimConfig,
    *,
    save: Callable[[Path], None],
    judge: Callable[[], Mapping[str, float]] | None,
    measures: Mapping[str, bool] | None,
    facts: Mapping[str, Any],
    callbacks: Sequence[Any] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """Fit an objective and leave ``OUTPUT/model`` with its recipe and a final manifest; the manifest."""
    facts = begin_manifest(config, stores=config.data.stores, parents=config.parents(), **facts)
    output = Path(config.output)
    if engines.rank() == 0:
        begun(output, config, facts)

    def export(folder: Path) -> None:
        save(folder)
        write_recipe(folder, config)
        write_manifest(folder, facts)

    trainer = M3DTrainer(
        objective,
        items,
        collate,
        optim,
        output,
        config.engine,
        save=export,
        evaluate=judge,
        best=config.best,
        measures=measures,
        callbacks=callbacks,
    )
    log.info("%s: %d steps of %d volumes (%d in an epoch)", config.stage, trainer.steps, optim.batch, items.images)
    trainer.fit(resume=resume)
    done: dict[str, Any] = finish_manifest(output, steps=trainer.steps) if engines.rank() == 0 else {}
    engines.barrier()
    return done


Sheet = Callable[[tuple[TrainingCase, ...]], Callable[[int, Path], None]]


def samples(config: Any, objective: nn.Module, sheet: Sheet) -> list[Samples]:  # noqa: ANN401
    """Sample predictions on the first volumes that are judged, on a ``sheet`` of them, where a stage wants any."""
    if config.samples_every is None or config.data.judged is None:
        return []
    cases = tuple(case for group in config.data.judged_groups() for case in group.cases[:2])
    return [
        Samples(
            config.samples_every,
            sheet(cases),
            Path(config.output) / "samples",
            objective=objective,
            together=config.engine.in_pieces,
        )
    ]


def _sheet(config: TalkConfig, built: Built) -> Sheet:
    from m3d.recipes.samples import SampleSheet

    return lambda cases: SampleSheet(built.model, built.processor, cases, bf16=config.optim.bf16)
