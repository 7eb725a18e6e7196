"""What ``[SEG]`` says to the mask head stays what the head has learned to follow, while nothing is drawn.

The head learns names from a language model's states (`m3d.train.drawing`). When that model then learns to read
pictures, its states change, and with them what they ask for: after 600 steps of alignment the head drew both parotids
where one was named. Here each ``[SEG]`` is held to what it said of its name before; ours, for a language model that
learns in full.
"""

# M = [SEG] tokens, K = names, R = wordings, C = width of the mask head

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Anchors"]


class Anchors(nn.Module):
    """What was said of each name to the head, in one or more wordings: ``(K, R, C)``. No parameters, not saved."""

    prompts: Tensor
    spread: Tensor

    def __init__(self, index: Mapping[str, int], prompts: Tensor) -> None:
        super().__init__()
        if prompts.ndim != 3 or len(prompts) != len(index):
            raise ValueError(f"{len(index)} names need prompts (K, R, C), got {tuple(prompts.shape)}")
        self.index = dict(index)
        self.register_buffer("prompts", prompts, persistent=False)
        self.register_buffer("spread", prompts.flatten(0, 1).var(dim=0, unbiased=False).mean(), persistent=False)

    def forward(self, said: Tensor, names: Sequence[str]) -> Tensor:
        """Squared distance of each prompt to the nearest wording of its name, ``(M, C) -> (M,)``.

        1 is the mean square of how prompts of all names differ. Names that were never read before weigh nothing.

        Raises:
            ValueError: There are not as many names as prompts.
        """
        if len(said) != len(names):
            raise ValueError(f"{len(said)} prompts, but {len(names)} names")
        known = [name in self.index for name in names]
        rows = torch.tensor([self.index.get(name, 0) for name in names], device=said.device)
        apart = (said.float()[:, None] - self.prompts[rows].float()).square().mean(dim=2)
        nearest: Tensor = apart.amin(dim=1) / self.spread
        return torch.where(torch.tensor(known, device=said.device), nearest, 0.0)
