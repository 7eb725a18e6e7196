"""LoRA on the language model, and on nothing else (M3D-LaMed, section 4.2: rank 16, alpha 32)."""

from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from m3d.models.modeling import M3DForConditionalGeneration

WHOLE_PARTS = ("vision_tower", "perceiver", "seg_projector", "seg_head")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Rank, alpha and dropout; the paper says dropout 0.1, the released script 0.05."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05


def language_linears(model: M3DForConditionalGeneration) -> list[str]:
    """The full names of the language model's linear layers, its output projection left out."""
    head = model.get_output_embeddings()
    return [
        f"language_model.{name}"
        for name, module in model.language_model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]


def add_lora(model: M3DForConditionalGeneration, lora: Lora, *, train_whole: bool = True) -> PeftModel:
    """Wrap a model for low-rank training of its language model.

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
