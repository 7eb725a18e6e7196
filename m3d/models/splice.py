"""Put the volumes' tokens where their placeholders stand, however many volumes a prompt has and wherever they are."""

# B = rows of text, T = tokens, V = volumes, S = places (runs of K placeholders, in reading order), K, E as elsewhere

import torch
from torch import Tensor


def splice(embeds: Tensor, input_ids: Tensor, volumes: Tensor, image_token_id: int) -> Tensor:
    """Replace placeholder embeddings by volume tokens: ``(B, T, E)`` and ``(S, K, E) -> (B, T, E)``.

    Raises:
        ValueError: The batch's placeholders are not exactly S x K.
    """
    is_image = input_ids == image_token_id
    wanted, found = volumes.shape[0] * volumes.shape[1], int(is_image.sum())
    if wanted != found:
        raise ValueError(
            f"{volumes.shape[0]} volumes need {wanted} <im_patch> tokens in all, the prompts have {found} "
            f"(by row: {is_image.sum(dim=1).tolist()}); was a prompt truncated, or built for another perceiver?"
        )
    return embeds.masked_scatter(is_image[..., None], volumes.to(embeds.dtype))


def places_before(input_ids: Tensor, image_token_id: int, num_image_tokens: int) -> Tensor:
    """How many whole volumes have been shown before each position, over all rows in order: ``(B, T) -> (B, T)``."""
    is_image = (input_ids == image_token_id).flatten()
    return (torch.cumsum(is_image, 0) // num_image_tokens).view_as(input_ids)
