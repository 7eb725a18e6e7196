"""M3D-LaMed's released folders, LLaMA-2, LLaMA-3 or Phi-3, LoRA among the weights or not, as a whole model of ours.

``config.json`` says ``lamed_llama`` or ``lamed_phi3``; the language model's own fields in it are those of transformers,
so its config is built from them and no class of the folder is needed.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from m3d.convert.layouts import Folded, Layout, Options, below, fields_of, preparation, shapes_of
from m3d.convert.report import Shape
from m3d.convert.sizes import Shapes, head_config, tower_config
from m3d.convert.source import Source
from m3d.convert.words import SENTENCES, m3d_token_ids, read_tokenizer
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor, M3DSegConfig
from m3d.models.lora import Lora, lora_config
from m3d.models.published import new_name as lamed_name

WRAPPED, BASE = "base_model.model.", ".base_layer."
LOW_RANK = re.compile(r"^(?P<layer>.+)\.lora_(?P<which>[AB])\.default\.weight$")
PREFIX = "lamed_"
FAMILIES = {"llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM"}
NOT_FIELDS = ("architectures", "model_type", "transformers_version", "dtype", "_name_or_path")
ROPE = ("rope_theta", "rope_scaling")
LANGUAGE = "language_model."


def lamed_layout(source: Source, shapes: Shapes, options: Options) -> Layout:
    """The whole model; with ``lora="keep"`` all but the language model, which stands in a folder inside, and its LoRA.

    Raises:
        ValueError: The folder's config, tokenizer and weights do not belong together, or ask for what we have not.
    """
    fields = fields_of(source, options)
    family = _family(fields, options.beside or source.folder)
    tokenizer = read_tokenizer(options.beside or source.folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    low_rank = {name: found for name in shapes if (found := LOW_RANK.match(name))}
    bare = {_bare(name): shape for name, shape in shapes.items() if name not in low_rank}
    config = _config(fields, family, bare, tokenizer, options, source)
    config.architectures = [M3DForConditionalGeneration.__name__]
    with torch.device("meta"):
        expected = shapes_of(M3DForConditionalGeneration(config))
    pairs = _pairs(low_rank, shapes, bare, options)
    layout = Layout(
        kind="lamed",
        published={name: shape for name, shape in shapes.items() if name not in low_rank},
        new_name=lambda name: lamed_name(_bare(name)),
        expected=expected,
        save=lambda folder, dtype: _save(folder, dtype, config, tokenizer, source, options),
        folded=pairs,
    )
    if not pairs:
        return layout
    rank = shapes[next(iter(pairs.values())).down][0]
    note = f"LoRA on {len(pairs)} layers, rank {rank} by its shapes, alpha {options.lora_alpha} (no file says it)"
    if options.lora == "merge":
        return replace(layout, notes=(f"{note}: folded in",))
    return replace(_kept(layout, shapes, config, tokenizer, Lora(rank=rank, alpha=options.lora_alpha)), notes=(note,))


def _family(fields: Mapping[str, Any], folder: Path) -> str:
    kind = str(fields.get("model_type"))
    family = kind.removeprefix(PREFIX)
    if not fields:
        raise ValueError(f"{folder} has no config.json; name the folder of the released model that has it: --beside")
    if not kind.startswith(PREFIX) or family not in FAMILIES:
        known = ", ".join(PREFIX + name for name in FAMILIES)
        raise ValueError(f"{folder}/config.json says model_type={kind!r}; a released M3D-LaMed says one of {known}")
    return family


def _config(
    fields: Mapping[str, Any],
    family: str,
    bare: Shapes,
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    source: Source,
) -> M3DConfig:
    for name, only in (("vision_select_layer", -1), ("vision_select_feature", "patch")):
        if fields.get(name, only) != only:
            raise ValueError(f"{source.path}: {name}={fields[name]!r} is not supported, {only!r} alone (as released)")
    text: Any = AutoConfig.for_model(family)
    known = {*text.to_dict(), *ROPE} - set(NOT_FIELDS)
    text = AutoConfig.for_model(family, **{name: value for name, value in fields.items() if name in known})
    ids = m3d_token_ids(tokenizer, source.path)
    if fields.get("seg_token_id", ids["seg_token_id"]) != ids["seg_token_id"]:
        raise ValueError(
            f"{source.path}: config.json says seg_token_id={fields['seg_token_id']}, its tokenizer reads [SEG] as "
            f"{ids['seg_token_id']}; take the tokenizer that belongs to it"
        )
    return M3DConfig(
        vision_config=tower_config(below(bare, "model.vision_tower.vision_tower."), fields, heads=options.vision_heads),
        text_config=text,
        seg_config=_seg(bare, fields, options),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        **_pooling(fields, source.path),
        **ids,
    )


def _seg(bare: Shapes, fields: Mapping[str, Any], options: Options) -> M3DSegConfig | None:
    own = below(bare, "model.seg_module.")
    if not own:
        return None
    seg = head_config(own, fields, heads=options.vision_heads)
    seg.merge = "mean"  # several [SEG] draw one mask there
    return seg


def _pooling(fields: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The perceiver's settings by ours; their defaults are those of the released code."""
    kind = fields.get("mm_projector_type", "spp")
    if kind == "linear":
        return {"pooling": "spatial", "pool_size": 1, "projector": "linear", "projector_depth": 1}
    if kind != "spp":
        raise ValueError(f"{where}: mm_projector_type={kind!r} is not supported; the released models have 'spp'")
    return {
        "pooling": fields.get("proj_pooling_type", "spatial"),
        "pool_size": fields.get("proj_pooling_size", 2),
        "projector": fields.get("proj_layer_type", "mlp"),
        "projector_depth": fields.get("proj_layer_num", 2),
    }


def _bare(name: str) -> str:
    """A name as it was before peft wrapped the model."""
    return name.removeprefix(WRAPPED).replace(BASE, ".")


def _pairs(
    low_rank: Mapping[str, "re.Match[str]"], shapes: Shapes, bare: Shapes, options: Options
) -> dict[str, Folded]:
    """LoRA pairs by the weight that each is added to.

    Raises:
        ValueError: A half is missing, or does not fit its weight.
    """
    pairs = {}
    for layer in dict.fromkeys(found["layer"] for found in low_rank.values()):
        weight, down, up = (
            f"{layer}.base_layer.weight",
            f"{layer}.lora_A.default.weight",
            f"{layer}.lora_B.default.weight",
        )
        lost = [name for name in (weight, down, up) if name not in shapes]
        if lost:
            raise ValueError(f"{lost[0]} is missing beside the rest of its LoRA layer; is the file whole?")
        (leaving, entering), (rank, into) = shapes[weight], shapes[down]
        if into != entering or shapes[up] != (leaving, rank):
            raise ValueError(
                f"{layer}: LoRA of {shapes[down]} and {shapes[up]} does not fit a weight of {shapes[weight]}"
            )
        pairs[weight] = Folded(down, up, options.lora_alpha / rank)
    return pairs


def _save(
    folder: Path,
    dtype: torch.dtype,
    config: M3DConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    options: Options,
) -> None:
    for one in (config, config.text, config.vision, config.seg):
        if one is not None:
            one.dtype = dtype
    config.save_pretrained(folder)
    _generation(config, tokenizer, options.beside or source.folder).save_pretrained(folder)
    prepared = preparation(config.vision.image_size, options)
    M3DProcessor(tokenizer, prepared, config.num_image_tokens).save_pretrained(folder)
    sentences = (options.beside or source.folder) / SENTENCES
    if sentences.is_file():
        shutil.copyfile(sentences, folder / SENTENCES)


def _generation(config: M3DConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> GenerationConfig:
    """Where answers end, as released; how they are drawn is for whoever asks (the released demo samples)."""
    if (folder / "generation_config.json").is_file():
        end = GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        end = config.text.eos_token_id
    return GenerationConfig(
        bos_token_id=config.text.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )


# -- LoRA kept beside the language model ------------------------------------------------------------------------------


def _kept(whole: Layout, shapes: Shapes, config: M3DConfig, tokenizer: PreTrainedTokenizerBase, lora: Lora) -> Layout:
    """As training keeps it: ``parts``, peft's ``adapter_model``, and the language model in a folder of its own."""
    low_rank = {
        half: f"adapter_model:{WRAPPED}{_layer(pair.down)}.lora_{which}.weight"
        for pair in whole.folded.values()
        for half, which in ((pair.down, "A"), (pair.up, "B"))
    }
    targets = sorted({_layer(pair.down) for pair in whole.folded.values()})
    expected: dict[str, Shape] = {_place(name): shape for name, shape in whole.expected.items()}
    expected |= {name: shapes[half] for half, name in low_rank.items()}

    def new_name(name: str) -> str | None:
        if name in low_rank:
            return low_rank[name]
        ours = whole.new_name(name)
        return None if ours is None else _place(ours)

    def save(folder: Path, dtype: torch.dtype) -> None:
        whole.save(folder, dtype)
        lora_config(targets, lora).save_pretrained(str(folder))
        _save_language_model(folder / LANGUAGE.removesuffix("."), config.text, tokenizer)

    return replace(whole, published=shapes, new_name=new_name, expected=expected, save=save, folded={})


def _save_language_model(folder: Path, text: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    text.architectures = [FAMILIES[text.model_type]]
    text.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _place(ours: str) -> str:
    if ours.startswith(LANGUAGE):
        return f"language_model/model:{ours.removeprefix(LANGUAGE)}"
    return f"parts:{ours}"


def _layer(name: str) -> str:
    """Our full name of the layer that a half of a pair lies on."""
    found = LOW_RANK.match(name)
    assert found is not None
    ours = lamed_name(f"{_bare(found['layer'])}.weight")
    assert ours is not None
    return ours.removesuffix(".weight")


def folded_in(pairs: Mapping[str, Folded]) -> Iterator[str]:
    """The names of all halves of low-rank pairs."""
    for pair in pairs.values():
        yield from (pair.down, pair.up)
