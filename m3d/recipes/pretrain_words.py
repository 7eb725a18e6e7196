"""A language model from nothing reads the tasks' texts alone, before any picture; for small models, not published.

``m3d train configs/tiny/words.yaml``. The result, ``OUTPUT/model``, is a LLaMA folder with a tokenizer of its own, as
``init.language_model`` takes it.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from m3d.models.fold import whole_state
from m3d.models.processing import add_m3d_tokens
from m3d.models.weights import write_weights
from m3d.recipes.talk import StoresConfig, dataset, to_device, train
from m3d.tasks import check_tasks
from m3d.train import engines
from m3d.train.byte_bpe import byte_bpe
from m3d.train.data import Group, VolumeDataset
from m3d.train.engines import Engine
from m3d.train.optim import OptimConfig
from m3d.train.reading import ReadWords, WordCollator, Words, texts

SPECIAL = ["<pad>", "<s>", "</s>"]


@dataclass(frozen=True, kw_only=True)
class TextsConfig(StoresConfig):
    """And which texts: tasks by weight, ``exchanges`` of a case at a time.

    Attributes:
        measured: Share of the answers that stand behind the values that they rest on, where the record has evidence.
        unseen: Share of these whose values are "not seen".
        prompts: Whether prompts and values are learned too, or only what a model has to say.
    """

    weights: dict[str, float] = field(default_factory=dict)
    exchanges: int = 8
    max_length: int = 512
    measured: float = 0.0
    unseen: float = 0.0
    prompts: bool = True

    def __post_init__(self) -> None:
        """Refuse tasks that are none."""
        super().__post_init__()
        check_tasks(self.weights, "data.weights")


@dataclass(frozen=True, kw_only=True)
class LanguageSizes:
    """A LLaMA of a few layers; ``vocabulary`` is at most that of its tokenizer, the 256 bytes included."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    vocabulary: int = 1024
    positions: int = 2048

    def config(self, tokens: int, **more: Any) -> LlamaConfig:  # noqa: ANN401
        """The config of a language model that knows so many ``tokens``."""
        return LlamaConfig(
            vocab_size=tokens,
            hidden_size=self.width,
            intermediate_size=8 * self.width // 3,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.positions,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything the stage can be told."""

    stage: Literal["pretrain_words"] = "pretrain_words"
    output: str = "runs/pretrain_words"
    seed: int = 0
    data: TextsConfig
    model: LanguageSizes = field(default_factory=LanguageSizes)
    optim: OptimConfig
    best: str | None = None
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        """Refuse what would be passed over."""
        self.optim.refuse_seed()

    def parents(self) -> dict[str, str | None]:
        """None: it begins from nothing."""
        return {}


def read_texts(groups: Iterable[Group], weights: dict[str, float], measured: float = 0.0) -> Iterator[str]:
    """Texts of every case, as many as it has records, of tasks that have weight."""
    rng = random.Random(0)
    for case in (case for group in groups for case in group.cases):
        labels = torch.from_numpy(case.read()[1])
        for said in texts(case, labels, weights, len(case.entries), rng, measured=measured):
            yield f"{said.prompt} {said.answer}"


def train_tokenizer(read: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts, digits apart, in LLaMA's layout (BOS first)."""
    tokenizer = byte_bpe(read, vocabulary, SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )


def build(sizes: LanguageSizes, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A LLaMA from nothing for this tokenizer."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = sizes.config(len(tokenizer), tie_word_embeddings=False, **ids)
    return LlamaForCausalLM(config)


def save_language(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a Hugging Face folder."""
    write_weights(whole_state(model), folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Make a tokenizer and a language model of the stores' texts; the manifest."""
    engines.prepare(config.engine)
    data, optim = config.data, replace(config.optim, seed=config.seed)
    read = read_texts(data.groups(), data.weights, data.measured)
    tokenizer = train_tokenizer(read, config.model.vocabulary)
    add_m3d_tokens(tokenizer)
    torch.manual_seed(config.seed)
    model = build(config.model, tokenizer)
    view = Words(
        tokenizer=tokenizer,
        weights=data.weights,
        exchanges=data.exchanges,
        max_length=data.max_length,
        measured=data.measured,
        unseen=data.unseen,
        prompts=data.prompts,
    )
    assert isinstance(tokenizer.pad_token_id, int)
    collate = WordCollator(pad_token_id=tokenizer.pad_token_id)
    objective = ReadWords(model)
    judged = VolumeDataset(data.judged_groups(), view, seed=0) if data.judged is not None else None

    def judge() -> dict[str, float]:
        assert judged is not None
        items = [judged[number] for number in range(len(judged))]
        batch = to_device(collate(items), model.device)
        return {"loss": float(objective(batch)["words"].total) / max(1, batch["counts"]["words"])}

    return train(
        config,
        objective,
        dataset(data, view, optim, config.seed),
        collate,
        optim,
        save=lambda folder: save_language(folder, model, tokenizer),
        judge=None if judged is None else judge,
        measures={"loss": False},
        facts={"parameters": sum(parameter.numel() for parameter in model.parameters())},
        resume=resume,
    )
