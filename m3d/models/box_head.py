"""Numbers read off a language model's states: boxes beside their digits, and what was measured.

Digits say little of where to look: of two boxes a voxel apart all may differ. So the state at ``<bx_start>`` gives the
box itself, as in NExT-Chat (Zhang et al. 2023), and where a model has such a head its digits are written from it. Ours;
M3D-LaMed says boxes in digits alone.
"""

# N = states, E = the language model's width

from torch import Tensor, nn


def number_reader(width: int, numbers: int) -> nn.Sequential:
    """From states ``(N, E)`` to ``(N, numbers)``."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, numbers))


def read_boxes(head: nn.Sequential, states: Tensor) -> Tensor:
    """The boxes ``(N, 6)`` that states at ``<bx_start>`` mean: lower, then upper corner, as fractions of the grid."""
    first = head[0]
    assert isinstance(first, nn.Linear)
    read: Tensor = head(states.to(first.weight.dtype)).float().sigmoid()
    return read
