"""What a training step keeps for its backward pass, by formula: bytes on one GPU, before anything is allocated.

Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) count ``s b h (34 + 5 a s / h)`` bytes for a GPT layer in half
precision. Ours differ where their layer does: attention goes through SDPA, which keeps its inputs and its output but no
``s x s`` matrix, so the second term goes; there is no dropout in a pretrained layer, so 34 becomes 32; a LLaMA layer
has two RMSNorms, which Hugging Face computes in float32, and three MLP products of another width; a frozen linear layer
hands the gradient on without keeping its input; and a LoRA beside it keeps that input after dropout, and the dropout's
mask. `tests/train/test_estimate.py` compares the formulas with what autograd really keeps.
"""

# h = width, f = width inside the MLP, c = bytes of a computed value (2 in bf16), r = bytes of the residual stream

import math
from dataclasses import dataclass
from typing import Literal, Self

from transformers import PreTrainedConfig

from m3d.models.config import M3DConfig, M3DVisionConfig

How = Literal["frozen", "lora", "full"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One micro batch of one GPU, and in which precision it is computed.

    ``rows`` of ``tokens`` each, image tokens included, speak of ``volumes``; ``masks`` are drawn; ``scored`` tokens of
    a row have logits. ``wide`` is autocast: weights and the residual stream stay in float32, unlike DeepSpeed's bf16
    and a language model that was loaded in bf16.
    """

    rows: int
    tokens: int
    volumes: int
    scored: int = 0
    masks: int = 0
    checkpointing: bool = False
    bf16: bool = True
    wide: bool = False
    lora_dropout: bool = True

    @property
    def computed(self) -> int:
        """Bytes of a value that is computed."""
        return 2 if self.bf16 else 4

    @property
    def residual(self) -> int:
        """Bytes of a value of the residual stream."""
        return 4 if self.wide or not self.bf16 else 2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A transformer's: ``fused`` has q, k, v as one linear layer and gate, up as another, as Phi-3."""

    width: int
    mlp: int
    layers: int
    heads: int
    vocabulary: int = 0
    fused: bool = False

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        """The sizes by the names that LLaMA, Qwen, Phi, BERT and our ViT share."""
        return cls(
            width=config.hidden_size,
            mlp=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            vocabulary=getattr(config, "vocab_size", 0),
            fused=config.model_type == "phi3",
        )

    @property
    def linear_inputs(self) -> tuple[int, ...]:
        """Widths of what goes into each linear layer of a LLaMA-like layer."""
        return (self.width,) * (3 if self.fused else 6) + (self.mlp,)


def vit_layer(sizes: Sizes, work: Work) -> int:
    """Bytes a token that a pre-norm layer with LayerNorm and a plain MLP keeps: 32 h in bf16 (34 h less dropout)."""
    c, r = work.computed, work.residual
    norms = 2 * r * sizes.width + 2 * c * sizes.width  # what goes in, what comes out and into the linear layers
    attention = 4 * c * sizes.width + 4 * sizes.heads  # q, k, v and the mixed values; a sum a head
    return norms + attention + 2 * c * sizes.mlp  # before and after GELU


def language_layer(sizes: Sizes, how: How, work: Work) -> int:
    """Bytes a token that a LLaMA-like layer keeps: RMSNorm in float32, SwiGLU, key and value heads repeated."""
    c, width, inputs = work.computed, sizes.width, sizes.linear_inputs
    kept = 2 * 4 * width  # float32 inside both norms
    kept += 4 * c * width + 4 * sizes.heads  # q, k, v after the rotation and the mixed values; a sum a head
    kept += 3 * c * sizes.mlp  # gate, its SiLU, up
    if how == "frozen":
        return kept
    if how == "lora" and work.lora_dropout:
        return kept + sum(inputs) * (c + 1)  # each adapter has its own dropout: its output, and a mask of bytes
    # Autocast copies what goes into each linear layer, but for the mixed values, which are in bf16 already.
    kept += c * (sum(inputs) - width if work.wide else 2 * width + sizes.mlp)
    return kept + 2 * work.residual * width if how == "full" else kept  # and the normed values, for the norms' gain


def stacked(layers: int, kept: int, entering: int, tokens: int, *, checkpointing: bool) -> int:
    """Bytes of a stack: every layer's, or with checkpointing what enters each and the one layer that is done again."""
    return tokens * (layers * entering + kept if checkpointing else layers * kept)


def vision(config: M3DVisionConfig, work: Work) -> int:
    """Bytes of a tower that learns; a frozen one keeps nothing, for no gradient goes through it."""
    tokens = work.volumes * (math.prod(config.grid) + int(config.cls_token))
    return encoder(Sizes.of(config), tokens, work) + detail(config, work)


def detail(config: M3DVisionConfig, work: Work) -> int:
    """Bytes of the features of every voxel: a SegResNet, its output, and the mixture before its GELU, twice as wide."""
    if not config.detail_channels:
        return 0
    assert config.image_size is not None
    voxels = work.volumes * math.prod(config.image_size)
    return voxels * work.computed * (16 * config.detail_filters + 3 * config.detail_channels)


def encoder(sizes: Sizes, tokens: int, work: Work) -> int:
    """Bytes of a stack of `vit_layer`, which BERT's layers keep too."""
    entering = work.residual * sizes.width
    return stacked(sizes.layers, vit_layer(sizes, work), entering, tokens, checkpointing=work.checkpointing)


def language(text: PreTrainedConfig, how: How, work: Work) -> int:
    """Bytes of a language model; frozen, it still hands the gradient to what stands before it."""
    sizes, tokens = Sizes.of(text), work.rows * work.tokens
    entering = work.residual * sizes.width
    return stacked(sizes.layers, language_layer(sizes, how, work), entering, tokens, checkpointing=work.checkpointing)


def logits(text: PreTrainedConfig, work: Work) -> int:
    """Bytes of the vocabulary's scores: as computed, in float32, their log-softmax, and the gradient of it."""
    return work.rows * work.scored * Sizes.of(text).vocabulary * (work.computed + 4 + 4 + 4)


def perceiver(config: M3DConfig, work: Work) -> int:
    """Bytes of the projection of the pooled tokens: what enters each linear layer and each GELU."""
    width, inside = config.vision.hidden_size, Sizes.of(config.text).width
    width *= config.pool_size**3 if config.pooling == "stacked" else 1
    return work.volumes * config.num_image_tokens * work.computed * (width + 2 * inside * (config.projector_depth - 1))


def mask_head(config: M3DConfig, work: Work) -> int:
    """Bytes of drawing, for each mask: the two-way decoder, two upscalings, the losses."""
    seg = config.seg
    if seg is None:
        return 0
    grid = seg.encoder or config.vision
    assert grid.image_size is not None
    tokens, voxels, c, r = math.prod(grid.grid), math.prod(grid.image_size), work.computed, work.residual
    block = 3 * c + 2 * c + r if r > c else 5 * c  # an autocast linear layer keeps a copy of its own
    decoder = seg.decoder_depth * block + 3 * c
    upscaling = 21 * c + 2 * r  # norm, two GELUs and two convolutions at 8 and 64 times the tokens
    per_mask = tokens * grid.hidden_size * (decoder + upscaling) + voxels * 5 * 4
    return work.masks * per_mask
