"""What a vision tower that stands still has seen of pictures that are shown again: its tokens, kept in memory."""

# V = volumes, N = tokens of a volume, C = tower width, (D, H, W) = the model's grid

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m3d.memory import available_memory

GIB = 2**30
BYTES = 2  # a number of bfloat16


class KeptTokens:
    """Tokens by the picture's name, in bfloat16 and the CPU's memory."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, tower: nn.Module, volumes: Tensor, pictures: Sequence[str]) -> Tensor:
        """What ``tower`` sees of ``(V, 1, D, H, W)``, its class token included: ``(V, N, C)``, without gradient.

        It looks at each picture once, and alone, so that what it sees does not depend on the company.
        """
        weights = next(tower.parameters())
        for number, picture in enumerate(pictures):
            if picture not in self._kept:
                with torch.no_grad():
                    seen: Tensor = tower(volumes[number : number + 1].to(weights.dtype))
                self._kept[picture] = seen[0].to("cpu", torch.bfloat16)
        return torch.stack([self._kept[picture] for picture in pictures]).to(weights.device, weights.dtype)


def still(tower: nn.Module) -> bool:
    """Whether nothing of a tower learns."""
    return not any(parameter.requires_grad for parameter in tower.parameters())


def refuse_large(volumes: int, looks: int, tokens: int, width: int) -> None:
    """Stop before the albums of this machine's processes outgrow the memory that is free.

    Each of them comes to see every volume, in all its looks and as it is.

    Raises:
        ValueError: It would; the message says by how much.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = here * volumes * (looks + 1) * tokens * width * BYTES / GIB
    free = available_memory() / GIB
    if needed > free:
        raise ValueError(
            f"data.looks={looks} keeps {tokens} x {width} numbers of each of {volumes} volumes' pictures: "
            f"{needed:.1f} GiB in {here} processes, and {free:.1f} are free; take fewer looks, or 0 to look anew at "
            "every visit"
        )
