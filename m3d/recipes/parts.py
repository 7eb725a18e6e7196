"""Which parts of a model learn: each one frozen, by LoRA, or in full; chosen by module, never by pieces of names."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor, nn

from m3d.models import M3DForConditionalGeneration
from m3d.models.lora import Lora, inject_lora, lora_layers
from m3d.models.token_rows import EmbeddingRows, HeadRows, learn_rows
from segvol_head import SegVol

How = Literal["frozen", "lora", "full"]
MODULES = ("vision_tower", "perceiver", "language_model", "seg_projector", "seg_head")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """How each part learns; the default is the paper's alignment stage (section 4.2): perceiver and new tokens.

    ``new_tokens`` are the rows of ``<im_patch> <bx_start> <bx_end> [SEG]`` in the language model's input and output
    tables. Where the language model learns in full, they are a part of it. (The released stage-1 script trains the
    whole input table and freezes the output projection; REFERENCE A3.)
    """

    vision_tower: How = "frozen"
    perceiver: How = "full"
    language_model: How = "frozen"
    new_tokens: How = "full"
    seg_projector: How = "frozen"
    seg_head: How = "frozen"
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name in (*MODULES, "new_tokens"):
            if getattr(self, name) not in get_args(How):
                raise ValueError(f"parts.{name}={getattr(self, name)!r} is none of {', '.join(get_args(How))}")
        if self.new_tokens == "lora":
            raise ValueError("parts.new_tokens=lora: four rows have no low rank; use full or frozen")
        if self.language_model == "full" and self.new_tokens != "full":
            raise ValueError("parts.language_model=full trains all rows; set parts.new_tokens=full, or use lora")

    def of(self, how: How) -> list[str]:
        """The modules that learn this way."""
        return [name for name in MODULES if getattr(self, name) == how]


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Numbers of one part: ``learned`` values of ``total``."""

    learned: int
    total: int


def apply(model: M3DForConditionalGeneration, parts: Parts, *, boxes: bool = False) -> dict[str, Learning]:
    """Make a model learn just so, in place; LoRA layers and learned rows are added where they are asked for.

    A box head learns where there is a loss of ``boxes``.

    Raises:
        ValueError: A part that is to learn is not there, or the model has other LoRA layers already.
    """
    for name in MODULES:
        if getattr(model, name) is None and getattr(parts, name) != "frozen":
            raise ValueError(f"parts.{name}={getattr(parts, name)}, but this model has none; set it to frozen")
    if parts.new_tokens == "full" and parts.language_model != "full":
        learn_rows(model.language_model, token_rows(model))
    if parts.of("lora"):
        inject_lora(model, parts.of("lora"), parts.lora)
    model.requires_grad_(False)
    for module in _whole(model, parts):
        module.requires_grad_(True)
    for module in _without_a_loss(model.seg_head):
        module.requires_grad_(False)
    if model.box_head is not None:
        model.box_head.requires_grad_(boxes)
    for parameter in [*_low_rank(model), *_rows(model)]:
        parameter.requires_grad_(True)
    return counts(model)


def counts(model: M3DForConditionalGeneration) -> dict[str, Learning]:
    """How much of each part learns, shared parameters once; ``new_tokens`` are those that learn apart from a table."""
    rows = {id(parameter) for parameter in _rows(model)}
    found = {}
    for name in (*MODULES, "box_head"):
        module = getattr(model, name)
        own = [] if module is None else [one for one in module.parameters() if id(one) not in rows]
        found[name] = _count(own)
    return found | {"new_tokens": _count(list(_rows(model)))}


def token_rows(model: M3DForConditionalGeneration) -> list[int]:
    """The ids of our own tokens."""
    return [getattr(model.config, f"{name}_token_id") for name in ("image", "box_start", "box_end", "seg")]


def learned_row_ids(model: M3DForConditionalGeneration) -> Tensor | None:
    """The ids of rows that learn apart from their table, if there are any."""
    table = model.get_input_embeddings()
    return table.rows if isinstance(table, EmbeddingRows) else None


def _count(parameters: list[nn.Parameter]) -> Learning:
    sizes = [(one.numel() or getattr(one, "ds_numel", 0), one.requires_grad) for one in parameters]
    return Learning(learned=sum(size for size, learns in sizes if learns), total=sum(size for size, _ in sizes))


def _whole(model: M3DForConditionalGeneration, parts: Parts) -> Iterator[nn.Module]:
    for name in parts.of("full"):
        yield getattr(model, name)


def _low_rank(model: nn.Module) -> Iterator[nn.Parameter]:
    for layer in lora_layers(model):
        yield from layer.lora_A.parameters()
        yield from layer.lora_B.parameters()


def _rows(model: M3DForConditionalGeneration) -> list[nn.Parameter]:
    """Parameters of learned rows, each once (tied tables share theirs)."""
    owners = [module for module in model.language_model.modules() if isinstance(module, EmbeddingRows | HeadRows)]
    return list({id(owner.learned): owner.learned for owner in owners}.values())


def _without_a_loss(head: SegVol | None) -> Iterator[nn.Module]:
    """What no loss reaches: DDP would wait for its gradients, and weight decay would wear it away.

    The quality head was never trained, in the reference either, and of several masks only the first is drawn.
    """
    if head is not None:
        yield head.mask_decoder.iou_prediction_head
        yield from list(head.mask_decoder.output_hypernetworks_mlps)[1:]
