"""M3DForConditionalGeneration: it sees a volume, talks about it, and draws what it names.

The parts are the vision tower (`encoders`), the perceiver, any Hugging Face causal LM, and the SegVol head
(`segvol_head`); this file is where config meets modules. It follows transformers' conventions, so `generate`,
`from_pretrained`, `save_pretrained`, Trainer and peft work as their users know them.
"""

# B = rows of text, T = tokens, V = volumes, K = language tokens a volume, N = patches (d h w), C = vision width,
# E = language width, M = masks

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput, can_return_tuple

from encoders.vit3d import PatchEmbedding, ViT3D
from m3d.models.box_head import number_reader
from m3d.models.config import M3DConfig, M3DSegConfig, M3DVisionConfig
from m3d.models.own_init import OWN_INIT, init_as_torch_does, keep_own_head, keep_own_init
from m3d.models.packed_mask import for_attention
from m3d.models.perceiver import build_perceiver
from m3d.models.seg_token import SegTokens, find_seg_tokens, mean_per_row, seg_states
from m3d.models.splice import places_before, splice
from segvol_head import ImageFeatures, MaskDecoder3D, PromptEncoder3D, Prompts, SegVol

NO_HEAD = "this checkpoint has no mask head (its seg_config is null); use one that draws"


def build_vision_tower(config: M3DVisionConfig) -> ViT3D:
    """The 3D ViT that ``config`` describes."""
    assert config.image_size is not None and config.patch_size is not None
    return ViT3D(
        image_size=(config.image_size[0], config.image_size[1], config.image_size[2]),
        patch_size=(config.patch_size[0], config.patch_size[1], config.patch_size[2]),
        in_channels=config.in_channels,
        hidden_size=config.hidden_size,
        mlp_dim=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        cls_token=config.cls_token,
        detail_channels=config.detail_channels,
        detail_filters=config.detail_filters,
    )


def build_seg_head(config: M3DSegConfig, shared: M3DVisionConfig) -> SegVol:
    """The SegVol head that ``config`` describes; without an encoder of its own it is fed ``shared``'s tokens."""
    vision = config.encoder or shared
    assert vision.image_size is not None
    image_size = (vision.image_size[0], vision.image_size[1], vision.image_size[2])
    return SegVol(
        build_vision_tower(vision) if config.encoder is not None else None,
        PromptEncoder3D(
            width=vision.hidden_size,
            grid=vision.grid,
            image_size=image_size,
            coordinates=config.coordinates,
            mask_prompt=config.mask_prompt,
        ),
        MaskDecoder3D(
            width=vision.hidden_size,
            grid=vision.grid,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
            mlp_dim=config.decoder_mlp_dim,
            num_masks=config.num_masks,
            iou_hidden=config.iou_hidden_size,
            upscale_norm=config.upscale_norm,
        ),
        image_size=image_size,
        detail_channels=vision.detail_channels,
    )


@dataclass
class M3DVolumeFeatures(BaseModelOutputWithPooling):
    """A volume, looked at once.

    ``last_hidden_state`` is (V, N (+1), C), ``pooler_output`` (V, K, E), and for the head ``seg_tokens`` is
    (V, C, d, h, w) and ``seg_detail`` (V, F, D, H, W).
    """

    seg_tokens: Tensor | None = None
    seg_detail: Tensor | None = None


@dataclass
class M3DOutput(ModelOutput):
    """``loss`` is the language loss alone: `m3d.train` adds the mask losses, by name, from ``mask_logits``.

    ``mask_logits`` is (M, 1, D, H, W) on the prepared grid: one mask for each ``[SEG]`` of the batch, in reading order,
    or, with ``merge="mean"``, one for each row.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    mask_logits: Tensor | None = None
    volume_features: M3DVolumeFeatures | None = None


class M3DPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the family."""

    config: M3DConfig
    config_class = M3DConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - as the base class declares it
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True
    _no_split_modules = ["TransformerBlock", "SegVol"]  # noqa: RUF012 - as the base class declares it
    # What no quantiser of transformers may touch, and what `from_pretrained(dtype=float16)` leaves in float32.
    _keep_in_fp32_modules = ["vision_tower", "perceiver", "seg_head", "seg_projector", "box_head"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PatchEmbedding):
            init.trunc_normal_(module.position_embeddings, std=0.02)
        elif isinstance(module, ViT3D):
            if module.cls_token is not None:
                init.zeros_(module.cls_token)
        elif hasattr(module, OWN_INIT):
            init_as_torch_does(module)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]


class M3DForConditionalGeneration(M3DPreTrainedModel, GenerationMixin):
    """The whole model; see `M3DProcessor` for its inputs and `m3d.load` for everyday use."""

    accepts_loss_kwargs = False  # the loss is a per-batch mean: Trainer divides by accumulation steps itself

    def __init__(self, config: M3DConfig) -> None:
        super().__init__(config)
        vision, text, seg = config.vision, config.text, config.seg
        width = text.hidden_size
        self.vision_tower = build_vision_tower(vision)
        projector = config.projector, config.projector_depth
        self.perceiver = build_perceiver(
            config.pooling, vision.grid, config.pool_size, projector, vision.hidden_size, width
        )
        self.language_model = AutoModelForCausalLM.from_config(text)
        self.seg_head: SegVol | None = None
        self.seg_projector: nn.Module | None = None
        if seg is not None:
            self.merge = seg.merge
            self.seg_head = build_seg_head(seg, vision)
            seg_width = (seg.encoder or vision).hidden_size
            self.seg_projector = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, seg_width), nn.Dropout(seg.projector_dropout)
            )
            keep_own_head(self.seg_head, self.seg_projector)
        self.box_head = number_reader(width, 6) if config.box_head else None
        keep_own_init(self.vision_tower.detail, self.vision_tower.detail_embedding)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's output projection."""
        head: nn.Module | None = self.language_model.get_output_embeddings()
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's output projection."""
        self.language_model.set_output_embeddings(new_embeddings)

    # -- seeing ---------------------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> M3DVolumeFeatures:  # noqa: ANN401
        """Look at volumes once: ``(V, 1, D, H, W)`` in [0, 1] -> features for the language model and the mask head."""
        pixel_values = pixel_values.to(self.vision_tower.norm.weight.dtype)
        all_seen = self.vision_tower.look(pixel_values)
        patches = self.vision_tower.without_cls(all_seen.tokens)
        features = M3DVolumeFeatures(last_hidden_state=all_seen.tokens, pooler_output=self.perceiver(patches))
        if self.seg_head is None:
            return features
        shared = self.seg_head.image_encoder is None
        seen = self.seg_head.features(patches, all_seen.detail) if shared else self.seg_head.encode(pixel_values)
        features.seg_tokens, features.seg_detail = seen.tokens, seen.detail
        return features

    def draw_on(self, pixel_values: Tensor, prompts: Prompts) -> Tensor:
        """Draw P masks on one volume ``(1, 1, D, H, W)`` that nobody speaks of: ``(P, 1, D, H, W)`` logits.

        Raises:
            ValueError: The model has no mask head.
        """
        if self.seg_head is None:
            raise ValueError(NO_HEAD)
        pixel_values = pixel_values.to(self.vision_tower.norm.weight.dtype)
        if self.seg_head.image_encoder is not None:
            seen = self.seg_head.encode(pixel_values)
        else:
            tower = self.vision_tower.look(pixel_values)
            seen = self.seg_head.features(self.vision_tower.without_cls(tower.tokens), tower.detail)
        drawn: Tensor = self.seg_head.decode(seen, prompts)
        return drawn

    # -- drawing --------------------------------------------------------------------------------------------------

    def seg_prompts(self, hidden: Tensor, where: SegTokens) -> Tensor:
        """What each ``[SEG]`` tells the head: last states ``(B, T, E)`` -> ``(M, C)``, or ``(B, C)`` when merged."""
        if self.seg_projector is None:
            raise ValueError(NO_HEAD)
        states = seg_states(hidden, where).to(next(self.seg_projector.parameters()).dtype)
        if self.merge == "each":
            each: Tensor = self.seg_projector(states)
            return each
        merged: Tensor = self.seg_projector(mean_per_row(states, where, len(hidden)))
        spoke = torch.bincount(where.rows, minlength=len(hidden)) > 0
        return merged * spoke[:, None]  # the reference prompts with zeros where nothing was said

    def draw(
        self,
        features: M3DVolumeFeatures,
        *,
        text: Tensor | None = None,
        volume_index: Tensor,
        prompts: Prompts | None = None,
    ) -> Tensor:
        """Draw M masks from `seg_prompts` ``(M, C)``, geometric ``prompts``, or both: ``(M, 1, D, H, W)`` logits.

        ``volume_index`` (M,) says which volume each mask is of. Coordinates are voxels of the prepared grid.

        Raises:
            ValueError: The model has no mask head, or there is neither text nor geometry.
        """
        if self.seg_head is None or features.seg_tokens is None:
            raise ValueError(NO_HEAD)
        if any(weight.is_meta for weight in self.seg_head.parameters()):
            raise ValueError(
                "the mask head was offloaded, and cannot draw from there; give a device_map with seg_head on a device"
            )
        if text is not None:
            prompts = Prompts(text=text) if prompts is None else replace(prompts, text=text)
        if prompts is None:
            raise ValueError("nothing says what to draw: give [SEG] prompts, points, a box or a mask")
        seen = ImageFeatures(tokens=features.seg_tokens, detail=features.seg_detail)
        logits: Tensor = self.seg_head.decode(seen, prompts, volume_index)
        return logits

    def _draw_answers(
        self,
        input_ids: Tensor,
        hidden: Tensor,
        features: M3DVolumeFeatures,
        volume_index: Tensor,
        prompts: Prompts | None,
    ) -> Tensor:
        where = find_seg_tokens(input_ids, self.config.seg_token_id)
        shown = places_before(input_ids, self.config.image_token_id, self.config.num_image_tokens)
        text = self.seg_prompts(hidden, where)
        place = shown[:, -1] if self.merge == "mean" else shown[where.rows, where.positions]
        if (place == 0).any():
            raise ValueError("a [SEG] stands before any volume: there is nothing to draw on")
        return self.draw(features, text=text, volume_index=volume_index[place - 1], prompts=prompts)

    # -- talking --------------------------------------------------------------------------------------------------

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, dict[str, Any]]:
        """For beams and samples, as the base class, but no volume is copied: ``volume_index`` says who shows which."""
        features = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        held: dict[str, Any] = {}
        if expand_size > 1 and features is not None and input_ids is not None:
            held = {name: model_kwargs.pop(name, None) for name in ("mm_encoder_outputs", "volume_index")}
            index = held["volume_index"]
            if index is None:
                index = torch.arange(len(features.pooler_output), device=input_ids.device)
            shown = (input_ids == self.config.image_token_id).sum(dim=1) // self.config.num_image_tokens
            if int(shown.sum()) == len(index):  # else the prompts do not fit, as `splice` will say
                rows = index.split(shown.tolist())
                held["volume_index"] = torch.cat([row.repeat(expand_size) for row in rows])
        base: Any = super()
        expanded, rest = base._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        return expanded, rest | held

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,  # noqa: ANN401
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        mm_encoder_outputs: dict[str, M3DVolumeFeatures] | None = None,
        volume_index: Tensor | None = None,
        draw_masks: bool = False,
        seg_prompts: Prompts | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,  # noqa: ANN401
    ) -> M3DOutput:
        """Read ``(B, T)`` tokens beside volumes ``(V, 1, D, H, W)`` in [0, 1].

        Each run of ``<im_patch>`` placeholders shows one volume: ``volume_index`` (S,) says which one, so that rows can
        share a volume that is encoded once (by default the runs show the volumes in order). ``mm_encoder_outputs``
        gives features of `get_image_features` in place of ``pixel_values``, as `generate` does. With ``draw_masks``
        every ``[SEG]`` in ``input_ids`` is drawn, with ``seg_prompts`` beside its state where given. ``attention_mask``
        may be (B, 1, T, T) bool, who may attend to whom, as packed rows need it.

        Raises:
            ValueError: Placeholders and volumes do not match, or a mask is asked of a model that does not draw.
        """
        features = (mm_encoder_outputs or {}).get("image")
        if features is None and pixel_values is not None:
            features = self.get_image_features(pixel_values)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if features is not None:
                assert features.pooler_output is not None and input_ids is not None
                if volume_index is None:
                    volume_index = torch.arange(len(features.pooler_output), device=inputs_embeds.device)
                shown = features.pooler_output[volume_index]
                inputs_embeds = splice(inputs_embeds, input_ids, shown, self.config.image_token_id)
        keep_states = kwargs.pop("output_hidden_states", None)
        keep_states = draw_masks or (self.config.output_hidden_states if keep_states is None else keep_states)
        config = self.language_model.config
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=for_attention(attention_mask, config, inputs_embeds.dtype, position_ids),
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            output_hidden_states=keep_states,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        masks = None
        if draw_masks:
            if features is None or input_ids is None or volume_index is None:
                raise ValueError("draw_masks needs input_ids and the volumes they speak of")
            masks = self._draw_answers(input_ids, out.hidden_states[-1], features, volume_index, seg_prompts)
        return M3DOutput(
            loss=out.loss,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states if keep_states else None,
            attentions=out.attentions,
            mask_logits=masks,
            volume_features=features,
        )


AutoConfig.register("m3d", M3DConfig)
AutoConfig.register("m3d_vision", M3DVisionConfig)
AutoConfig.register("m3d_seg", M3DSegConfig)
AutoModel.register(M3DConfig, M3DForConditionalGeneration)
AutoModelForImageTextToText.register(M3DConfig, M3DForConditionalGeneration)
AutoModelForMultimodalLM.register(M3DConfig, M3DForConditionalGeneration)
