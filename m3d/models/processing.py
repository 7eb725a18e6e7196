"""M3DProcessor: a scan and words in, tensors out; the one place that knows how a prompt is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from transformers import AddedToken, AutoProcessor, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from data_prep.preprocess import Prepared, Preprocess
from data_prep.record import PLACEHOLDER
from data_prep.volume import Volume
from m3d.models.config import M3DConfig

IMAGE_TOKEN, BOX_START, BOX_END, SEG_TOKEN = "<im_patch>", "<bx_start>", "<bx_end>", "[SEG]"
IGNORED = -100


class TokenIds(TypedDict):
    """The fields of `M3DConfig` that hold our tokens' ids."""

    image_token_id: int
    box_start_token_id: int
    box_end_token_id: int
    seg_token_id: int


def add_m3d_tokens(tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """Teach a tokenizer our four tokens, in the reference's order; returns the config fields that hold their ids."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, BOX_START, BOX_END]})
    # [SEG] takes the space before it along, so that the state which predicts it is that of the name's last token.
    tokenizer.add_tokens([AddedToken(SEG_TOKEN, lstrip=True, special=False)])
    return TokenIds(
        image_token_id=_id_of(tokenizer, IMAGE_TOKEN),
        box_start_token_id=_id_of(tokenizer, BOX_START),
        box_end_token_id=_id_of(tokenizer, BOX_END),
        seg_token_id=_id_of(tokenizer, SEG_TOKEN),
    )


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def encode_exchange(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, given: Sequence[tuple[int, int]] = ()
) -> tuple[list[int], list[int]]:
    """Token ids and labels of ``prompt answer EOS``; only the answer and EOS are learned, less what is ``given``.

    Prompt and answer are tokenised together, as they will stand, and told apart by their character offsets; ``given``
    are those of the answer that a tool writes.
    """
    encoded = tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    begun = len(prompt) + 1
    stretches = [(begun + first, begun + last) for first, last in given]
    learned = [
        end > len(prompt) and not any(first <= start and end <= last for first, last in stretches)
        for start, end in encoded["offset_mapping"]
    ]
    if ids[-1] == tokenizer.eos_token_id:  # a tokenizer that ends every text by itself
        learned[-1] = True
    else:
        ids, learned = [*ids, tokenizer.eos_token_id], [*learned, True]
    return ids, [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]


class M3DProcessor(ProcessorMixin):
    """Prepare scans with the checkpoint's own `Preprocess` and write prompts with placeholders for them.

    A prompt is ``[BOS] <im_patch> x K text``; text may say where a volume stands with one ``<im_patch>`` of its own,
    else the volumes come first. Batches are padded on the right in training and on the left for generation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, preprocess: Preprocess, num_image_tokens: int) -> None:
        self.preprocess, self.num_image_tokens = preprocess, num_image_tokens
        super().__init__(tokenizer)  # type: ignore[no-untyped-call]

    def __call__(
        self,
        volumes: Volume | Prepared | Sequence[Volume | Prepared] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        volumes_per_text: Sequence[int] | None = None,
        padding_side: str = "left",
        **_: Any,  # noqa: ANN401
    ) -> BatchFeature:
        """``input_ids`` (B, T), ``attention_mask`` (B, T) and ``pixel_values`` (V, 1, D, H, W).

        ``volumes_per_text`` says how many of the volumes each text is about (one each by default).

        Raises:
            ValueError: Texts and volumes do not add up.
        """
        many = [] if volumes is None else [volumes] if isinstance(volumes, Volume | Prepared) else list(volumes)
        texts = [] if text is None else [text] if isinstance(text, str) else list(text)
        data: dict[str, torch.Tensor] = {}
        if many:
            data["pixel_values"] = torch.stack([self.pixels(volume) for volume in many])
        if texts:
            counts = list(volumes_per_text or self._default_counts(len(texts), len(many)))
            if len(counts) != len(texts) or sum(counts) != len(many):
                raise ValueError(
                    f"volumes_per_text={counts} does not share {len(many)} volumes among {len(texts)} texts"
                )
            prompts = [self.write(words, count) for words, count in zip(texts, counts, strict=True)]
            data |= self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side=padding_side)
            data.pop("token_type_ids", None)
        return BatchFeature(data)

    @staticmethod
    def _default_counts(num_texts: int, num_volumes: int) -> list[int]:
        if num_texts == 1:
            return [num_volumes]
        return [1 if num_volumes else 0] * num_texts

    def pixels(self, volume: Volume | Prepared) -> torch.Tensor:
        """One scan as the model sees it: ``(1, D, H, W)`` in [0, 1]."""
        prepared = volume if isinstance(volume, Prepared) else self.preprocess.apply(volume)
        return torch.from_numpy(np.ascontiguousarray(prepared.array))[None]

    def write(self, text: str, num_volumes: int = 1) -> str:
        """Put the placeholders of ``num_volumes`` volumes into a prompt; records write ``<image>`` for one."""
        text = text.replace(PLACEHOLDER, IMAGE_TOKEN)
        block = IMAGE_TOKEN * self.num_image_tokens
        standing = text.count(IMAGE_TOKEN)
        if standing and standing != num_volumes:
            raise ValueError(f"the prompt has {standing} {IMAGE_TOKEN} places for {num_volumes} volumes: {text[:80]!r}")
        return text.replace(IMAGE_TOKEN, block) if standing else block * num_volumes + text

    def batch_decode(self, ids: Any, **kwargs: Any) -> list[str]:  # noqa: ANN401
        """Token ids to words, keeping ``[SEG]`` and boxes."""
        texts: list[str] = self.tokenizer.batch_decode(ids, **({"skip_special_tokens": False} | kwargs))
        return texts

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        **kwargs: Any,  # noqa: ANN401
    ) -> list[str]:
        """Write tokenizer, ``processor_config.json`` and ``preprocess.json``."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        return [str(self.preprocess.write(folder))]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        **kwargs: Any,  # noqa: ANN401
    ) -> "M3DProcessor":
        """Read a checkpoint folder's tokenizer, preprocess and number of image tokens.

        Raises:
            FileNotFoundError: The folder has no ``preprocess.json``: it is not an M3D checkpoint.
        """
        folder = Path(pretrained_model_name_or_path)
        config = M3DConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(tokenizer, Preprocess.read(folder), config.num_image_tokens)


AutoProcessor.register(M3DConfig, M3DProcessor)
