"""Before a run starts: what learns, and what memory each GPU needs for it. Everything is counted, nothing is allocated.

Weights, gradients and optimizer: ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, sections 3.1 and 5). Adam in mixed
precision holds 2 bytes of weight, 2 of gradient and 12 of optimizer (a float32 copy, momentum, variance) for each value
that learns; stage 2 shares gradients and optimizer among the GPUs, stage 3 the weights too. A frozen value costs its
weight alone. Without DeepSpeed the weights stay as they were loaded, and Adam adds twice their bytes. Activations:
`m3d.train.activations`. The sum of all is an upper bound of the peak: gradients fill while activations empty.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from m3d.models.config import M3DConfig, M3DVisionConfig
from m3d.train import activations
from m3d.train.activations import How, Sizes, Work
from m3d.train.engines import EngineName

GIB = 2**30
RESERVE = 2 * GIB
"""CUDA context, NCCL buffers and what the allocator cannot use: what nvidia-smi shows above PyTorch's own count."""
BUCKET = 2 * 2 * 200_000_000
"""ZeRO's buckets, one to gather and one to reduce, as configs/engines/*-8xa100.json set them."""
LIVE = 2 * 1_000_000_000
"""ZeRO-3's stage3_max_live_parameters there: what may be gathered at one time, in bf16."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """Parameters of one part: values, what of them learns and in how many tensors, and the bytes as they are stored.

    ``wide`` are the values in four bytes, which autocast copies.
    """

    total: int = 0
    trainable: int = 0
    tensors: int = 0
    stored: int = 0
    stored_trainable: int = 0
    wide: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def part_of(name: str) -> str:
    """The part that a parameter belongs to; LoRA's layers and the learned rows of tokens are parts of their own."""
    steps = name.split(".")
    if any(step.startswith("lora_") for step in steps):
        return "lora"
    return "new_tokens" if steps[-1] == "learned" else steps[0]


def count_parameters(model: nn.Module) -> dict[str, Count]:
    """Parameters by part, shared ones once, in the order of the model."""
    counts: dict[str, Count] = {}
    for name, value in model.named_parameters():
        learns, size = value.requires_grad, value.numel() * value.element_size()
        one = Count(
            total=value.numel(),
            trainable=value.numel() * learns,
            tensors=int(learns),
            stored=size,
            stored_trainable=size * learns,
            wide=value.numel() * (value.element_size() == 4),
        )
        part = part_of(name)
        counts[part] = counts.get(part, Count()) + one
    return counts


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs of one machine, and the memory of each that a program gets."""

    gpus: int
    gib: float


MACHINES: Mapping[str, Machine] = {
    "8xA100-80GB": Machine(gpus=8, gib=79.2),
    "8xH200": Machine(gpus=8, gib=139.8),
    "1x24GB": Machine(gpus=1, gib=23.6),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a step is shared out: ``batch`` volumes a step over all GPUs, ``micro_batch`` at a time on each.

    ``whole`` is for losses that need all rows of a step at once: there a GPU encodes ``chunk`` of them at a time.
    """

    engine: EngineName
    gpus: int
    batch: int
    micro_batch: int
    checkpointing: bool = False
    offload: bool = False
    bf16: bool = True
    whole: bool = False
    chunk: int = 0

    @property
    def accumulation(self) -> int:
        """Micro batches of a GPU in one optimizer step."""
        return max(1, self.batch // (self.micro_batch * self.gpus))


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is said of one volume: ``texts`` rows of so many tokens, its own included, and the masks they ask for."""

    tokens: int
    texts: int = 1
    masks: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each GPU, and what an offloaded optimizer takes of the machine's own memory."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    reserve: int = RESERVE
    host: int = 0

    @property
    def total(self) -> int:
        """All of a GPU."""
        return sum(value for name, value in vars(self).items() if name != "host")


def states(counts: Mapping[str, Count], setup: Setup, *, block: int = 0) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer and communication; ``block`` are the values of FSDP's largest unit."""
    every, gpus = sum(counts.values(), Count()), setup.gpus
    if setup.engine in ("zero2", "zero3"):
        return _deepspeed(every, setup)
    adam = 2 * every.stored_trainable + 4 * every.tensors  # AdamW counts the steps of each tensor in a float32
    if setup.engine == "fsdp":
        gathered = 2 * (2 if setup.bf16 else 4) * block  # the unit at work and the one fetched ahead
        return {
            "weights": every.stored // gpus + gathered,
            "gradients": every.stored_trainable // gpus,
            "optimizer": adam // gpus,
            "buffers": 0,
        }
    casts = 2 * every.wide if setup.bf16 else 0  # autocast keeps its copies until the backward pass is done
    reducer = every.stored_trainable if setup.engine == "ddp" and gpus > 1 else 0  # DDP's buckets of gradients
    return {
        "weights": every.stored,
        "gradients": every.stored_trainable,
        "optimizer": adam,
        "buffers": casts + reducer,
    }


def _deepspeed(every: Count, setup: Setup) -> dict[str, int]:
    """ZeRO: in bf16 everything is held in two bytes, and what learns once more for Adam."""
    width, adam = (2, 12 * every.trainable) if setup.bf16 else (4, 8 * every.trainable)
    weights = width * every.total
    if setup.engine == "zero3" and setup.gpus > 1:
        weights = weights // setup.gpus + min(weights, LIVE)
    return {
        "weights": weights,
        "gradients": width * every.trainable // setup.gpus,
        "optimizer": 0 if setup.offload else adam // setup.gpus,
        "buffers": min(BUCKET, 2 * width * every.trainable),
        "host": adam if setup.offload else 0,
    }


def learning(model: nn.Module) -> dict[str, How]:
    """How each module learns, read off its parameters: in full if anything but LoRA's layers does."""
    how: dict[str, How] = {}
    for name, value in model.named_parameters():
        part, own = name.split(".")[0], part_of(name)
        how.setdefault(part, "frozen")
        if value.requires_grad and own == part:
            how[part] = "full"
        elif value.requires_grad and own == "lora" and how[part] == "frozen":
            how[part] = "lora"
    return how


Kept = Callable[[Setup], tuple[int, int]]
"""From a setup to the bytes of activations and of logits in one micro batch."""


def memory(counts: Mapping[str, Count], kept: Kept, setup: Setup, *, block: int = 0) -> Memory:
    """What a GPU needs for a step."""
    activations_, logits = kept(setup)
    return Memory(activations=activations_, logits=logits, **states(counts, setup, block=block))


def talk_and_draw(config: M3DConfig, how: Mapping[str, How], counts: Mapping[str, Count], row: Row) -> Kept:
    """What the whole model keeps for rows that speak of volumes and draw; ``row.tokens=0`` only draws."""
    base = counts.get("language_model", Count())

    def kept(setup: Setup) -> tuple[int, int]:
        autocast = setup.bf16 and setup.engine not in ("zero2", "zero3")
        towers = Work(
            rows=setup.micro_batch * row.texts,
            tokens=row.tokens,
            volumes=setup.micro_batch,
            scored=row.tokens - config.num_image_tokens,
            masks=math.ceil(setup.micro_batch * row.masks),
            checkpointing=setup.checkpointing,
            bf16=setup.bf16,
            wide=autocast,  # what learns is stored in float32
        )
        words = replace(towers, wide=autocast and base.wide == base.total)
        if not row.tokens:
            return sum(_seen(config, how, towers)), 0
        talked = activations.language(config.text, how.get("language_model", "frozen"), words)
        return talked + sum(_seen(config, how, towers)), activations.logits(config.text, words)

    return kept


def _seen(config: M3DConfig, how: Mapping[str, How], work: Work) -> Iterator[int]:
    """Activations of the parts that see and draw, where they learn."""
    seg = config.seg
    if how.get("vision_tower", "frozen") != "frozen":
        yield activations.vision(config.vision, work)
    if how.get("perceiver", "frozen") != "frozen":
        yield activations.perceiver(config, work)
    if seg is not None and work.masks:
        yield activations.mask_head(config, work)
    if seg is not None and seg.encoder is not None and work.masks and how.get("seg_head", "frozen") != "frozen":
        yield activations.vision(seg.encoder, work)


def pairs(vision: M3DVisionConfig, text: Sizes, tokens: int, *, looks: bool = True) -> Kept:
    """What two towers keep for pairs of a volume and a text of so many tokens; without ``looks`` no ViT learns."""

    def kept(setup: Setup) -> tuple[int, int]:
        number = min(setup.chunk or setup.micro_batch, setup.micro_batch)
        work = Work(
            rows=number,
            tokens=tokens,
            volumes=number,
            checkpointing=setup.checkpointing,
            bf16=setup.bf16,
            wide=setup.bf16 and setup.engine not in ("zero2", "zero3"),
        )
        seen = activations.vision(vision, work) if looks else 0
        return seen + activations.encoder(text, number * tokens, work), 0

    return kept


def largest_block(config: M3DConfig, counts: Mapping[str, Count]) -> int:
    """Values of FSDP's largest unit: a layer of the language model, or its table of tokens."""
    sizes = Sizes.of(config.text)
    return max(sizes.vocabulary * sizes.width, counts.get("language_model", Count()).total // sizes.layers)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a setup fits a machine; where it does not, the nearest that would, if any."""

    machine: str
    gib: float
    setup: Setup
    memory: Memory
    fits: bool
    remedy: Setup | None = None

    @property
    def advice(self) -> str:
        """What to change, in the words of the command line."""
        if self.fits:
            return "fits"
        if self.remedy is None:
            return "does not fit: take a smaller language model, LoRA in place of full training, or more GPUs"
        return "does not fit; would with " + " ".join(_changes(self.setup, self.remedy))


def _changes(old: Setup, new: Setup) -> Iterator[str]:
    if new.engine != old.engine:
        yield f"--engine {new.engine}"
    if new.micro_batch != old.micro_batch:
        yield f"optim.micro_batch={new.micro_batch}"
    if new.chunk != old.chunk:
        yield f"loss.chunk={new.chunk}"
    if new.checkpointing and not old.checkpointing:
        yield "checkpointing=true"
    if new.offload and not old.offload:
        yield "engine.deepspeed=engines/zero3-offload.json"


def judge(counts: Mapping[str, Count], kept: Kept, setup: Setup, name: str, *, block: int = 0) -> Verdict:
    """Whether ``setup``, on the GPUs of a machine, fits its memory; else the cheapest change that makes it fit."""
    machine = MACHINES[name]
    gpus = 1 if setup.engine == "single" else machine.gpus
    most = max(1, setup.batch // gpus)
    micro = most if setup.whole else min(setup.micro_batch, most)
    alone = gpus == 1 and setup.engine in ("ddp", "fsdp")
    here = replace(setup, gpus=gpus, micro_batch=micro, engine="single" if alone else setup.engine)
    limit, needed = machine.gib * GIB, memory(counts, kept, here, block=block)
    fits, remedy = needed.total <= limit, None
    if not fits:
        tried = (other for other in lighter(here) if memory(counts, kept, other, block=block).total <= limit)
        remedy = next(tried, None)
    return Verdict(machine=name, gib=machine.gib, setup=here, memory=needed, fits=fits, remedy=remedy)


SHARING: tuple[EngineName, ...] = ("single", "ddp", "zero2", "zero3")


def lighter(setup: Setup) -> Iterator[Setup]:
    """Setups that need less, the least costly in time first."""
    place = SHARING.index(setup.engine) if setup.engine in SHARING else len(SHARING) - 1
    stronger = SHARING[max(place + 1, 2) :] if setup.gpus > 1 else ()
    tries = [setup, *(replace(setup, engine=engine) for engine in stronger)]
    for tried in (*tries, replace(setup, engine="zero3", offload=True)):
        again = replace(tried, checkpointing=True)
        yield from (tried, *_fewer(tried)[:1], again, *_fewer(again))


def _fewer(setup: Setup) -> list[Setup]:
    """The same with a half, a quarter, ... of the rows at a time."""
    name = "chunk" if setup.whole else "micro_batch"
    at_once = (setup.chunk or setup.micro_batch) if setup.whole else setup.micro_batch
    sizes = [at_once // 2**n for n in range(1, 12) if at_once // 2**n]
    return [replace(setup, **{name: size}) for size in sizes]
