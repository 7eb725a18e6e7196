"""LoRA where it is asked for: on the language model (M3D-LaMed, section 4.2: rank 16, alpha 32), or on other parts."""

from collections.abc import Container, Iterable
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from m3d.models.modeling import M3DForConditionalGeneration

WHOLE_PARTS = ("vision_tower", "perceiver", "seg_projector", "seg_head")
ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Rank, alpha and dropout; the paper says dropout 0.1, the released script 0.05."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what peft would only find when it is built."""
        if self.rank < 1 or self.alpha < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"lora needs rank and alpha of 1 or more and a dropout below 1, got {self}")


def linears(model: M3DForConditionalGeneration, part: str) -> list[str]:
    """The full names of a part's linear layers, the language model's output projection left out."""
    whole = getattr(model, part)
    if whole is None:
        return []
    head = model.get_output_embeddings()
    left_out = set() if head is None else set(head.modules())
    return [
        f"{part}.{name}" if name else part
        for name, module in whole.named_modules()
        if isinstance(module, nn.Linear) and module not in left_out
    ]


def language_linears(model: M3DForConditionalGeneration) -> list[str]:
    """The full names of the language model's linear layers, its output projection left out."""
    return linears(model, "language_model")


def lora_config(targets: list[str], lora: Lora) -> LoraConfig:
    """The settings as peft reads them."""
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)


def inject_lora(model: M3DForConditionalGeneration, parts: Iterable[str], lora: Lora) -> LoraConfig:
    """Put low-rank layers into parts of a model, in place; the model keeps its class, its methods and its names.

    Those that it has already, from an earlier stage, go on learning.

    Raises:
        ValueError: It has others, or a part has no linear layer.
    """
    there = {name: one for name, one in model.named_modules() if isinstance(one, LoraLayer)}
    targets = []
    for part in parts:
        found = _before_lora(linears(model, part), there)
        if not found:
            raise ValueError(f"{part} has no linear layer for LoRA; train it frozen or full")
        targets += found
    if not there:
        return inject_at(model, targets, lora)
    sizes = {(one.r[ADAPTER], one.lora_alpha[ADAPTER]) for one in there.values()}
    if set(targets) != set(there) or sizes != {(lora.rank, lora.alpha)}:
        raise ValueError(
            "this model has LoRA layers of another rank or alpha, or on other layers, already; take theirs, or fold "
            "them in first with the `merge` stage"
        )
    for one in there.values():
        one.lora_dropout[ADAPTER] = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
    return lora_config(targets, lora)


def _before_lora(names: Iterable[str], there: Container[str]) -> list[str]:
    """Linear layers by the names that they had before low-rank ones were put around them."""
    outer = [name.removesuffix(".base_layer") if name.removesuffix(".base_layer") in there else name for name in names]
    return [name for name in outer if ".lora_" not in name]


def inject_at(model: M3DForConditionalGeneration, targets: list[str], lora: Lora) -> LoraConfig:
    """Put low-rank layers beside linear layers of these full names."""
    config = lora_config(targets, lora)
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for module in lora_layers(model):  # peft follows the base's type, and bfloat16 rounds small steps away
        module.lora_A.float()
        module.lora_B.float()
    return config


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Every low-rank layer of a model."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def add_lora(model: M3DForConditionalGeneration, lora: Lora, *, train_whole: bool = True) -> PeftModel:
    """Wrap a model for low-rank training of its language model with peft's own classes, outside of our recipes.

    With ``train_whole`` the other parts and the rows of our own tokens learn in full and are saved with the adapter, as
    in the paper's instruction stage.
    """
    parts = [name for name in WHOLE_PARTS if getattr(model, name) is not None] if train_whole else None
    rows = [getattr(model.config, f"{name}_token_id") for name in ("image", "box_start", "box_end", "seg")]
    tables: dict[str, list[int]] = {"embed_tokens": rows}
    if not model.config.text.tie_word_embeddings:
        tables["lm_head"] = rows
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=language_linears(model),
        modules_to_save=parts,
        trainable_token_indices=tables if train_whole else None,
    )
    return get_peft_model(model, config)
