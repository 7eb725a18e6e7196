"""M3DProcessor: a scan and words in, tensors out; the one place that knows how a prompt is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from transformers import AddedToken, AutoProcessor, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from data_prep.preprocess import Prepared, Preprocess
from data_prep.read import read_volume
from data_prep.record import PLACEHOLDER
from data_prep.volume import Volume
from m3d.models.config import M3DConfig

IMAGE_TOKEN, BOX_START, BOX_END, SEG_TOKEN = "<im_patch>", "<bx_start>", "<bx_end>", "[SEG]"
IGNORED = -100
Scan = Volume | Prepared | str | Path
Scans = Scan | Sequence[Scan]


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


def plain_words(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """An answer's words, boxes and ``[SEG]`` included, whose space the token took along."""
    silent = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    text = str(tokenizer.decode([token for token in tokens if token not in silent], skip_special_tokens=False))
    return " [SEG]".join(part.rstrip() for part in text.split("[SEG]")).strip()


def as_volume(scan: Scan) -> Volume | Prepared:
    """A scan as it is given, or read from its file.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(scan, str | Path):
        return read_volume(Path(scan))
    if not isinstance(scan, Volume | Prepared):
        raise TypeError(
            f"a scan is a file, a Volume or a Prepared, not {type(scan).__name__}; an array has no place in the "
            "patient: give m3d.Volume(array, affine)"
        )
    return scan


def _in_groups(images: Scans | Sequence[Scans] | None, num_texts: int) -> list[list[Scan]]:
    """The scans of each text; without texts, all in one group."""
    if images is None:
        return [[] for _ in range(num_texts)]
    scans: list[Any] = [images] if isinstance(images, Scan) else list(images)
    nested = [isinstance(one, list | tuple) for one in scans]
    if num_texts <= 1 and not any(nested):
        return [scans]
    groups = [list(one) if isinstance(one, list | tuple) else [one] for one in scans]
    if num_texts and len(groups) != num_texts:
        raise ValueError(f"{len(groups)} scans for {num_texts} texts; give each text its scan, or a list of scans")
    return groups


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
        images: Scans | Sequence[Scans] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool = True,
        padding_side: str = "left",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """``input_ids`` (B, T), ``attention_mask`` (B, T) and ``pixel_values`` (V, 1, D, H, W).

        ``images`` are scans, or files of scans: one for each text, or a list for each text; one text may be about all.

        Raises:
            BadScan, FileNotFoundError: A file is missing, broken or not a 3D scan.
            TypeError: An image is no scan, such as an array that does not say where its voxels are.
            ValueError: Texts and scans do not add up, or tensors are asked of another library than torch.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: the model takes tensors of torch; leave it at 'pt'")
        texts = [] if text is None else [text] if isinstance(text, str) else list(text)
        groups = _in_groups(images, len(texts))
        data: dict[str, torch.Tensor] = {}
        if any(groups):
            data["pixel_values"] = torch.stack([self.pixels(as_volume(scan)) for group in groups for scan in group])
        if texts:
            prompts = [self.write(words, len(group)) for words, group in zip(texts, groups, strict=True)]
            data |= self.tokenizer(prompts, return_tensors="pt", padding=padding, padding_side=padding_side)
            data.pop("token_type_ids", None)
        return BatchFeature(data)

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

    def post_process_image_text_to_text(
        self,
        generated_outputs: torch.Tensor,
        skip_special_tokens: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> list[str]:
        """What was said, as the pipeline shows it: boxes and ``[SEG]`` stay, though boxes are special tokens."""
        if not skip_special_tokens:
            return self.batch_decode(generated_outputs, **kwargs)
        image = _id_of(self.tokenizer, IMAGE_TOKEN)
        rows = [[token for token in row if token != image] for row in torch.as_tensor(generated_outputs).tolist()]
        return [plain_words(self.tokenizer, row) for row in rows]

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
