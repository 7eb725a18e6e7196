"""What a tower that stands still has seen: looked at once, alone, and never more than the memory holds."""

import psutil
import pytest
import torch
from torch import nn

from m3d.train.kept_tokens import KeptTokens, refuse_large, still


class Tower(nn.Module):
    """Two tokens of three numbers: sums of a volume's halves. It counts how many volumes it saw at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 0.5]), requires_grad=False)
        self.seen: list[int] = []

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(volumes))
        return volumes.flatten(1).unflatten(1, (2, -1)).sum(dim=-1, keepdim=True) * self.weight


def test_each_picture_is_looked_at_once_and_alone():
    tower, album = Tower(), KeptTokens()
    volumes = torch.arange(24.0).reshape(3, 1, 2, 2, 2)
    first = album(tower, volumes, ["a/0", "b/0", "a/1"])
    assert torch.equal(first, tower(volumes))  # whole numbers this small are exact in bfloat16
    again = album(tower, torch.zeros(2, 1, 2, 2, 2), ["a/1", "a/0"])
    assert torch.equal(again, first[[2, 0]])
    assert tower.seen == [1, 1, 1, 3]
    assert first.dtype == torch.float32


def test_a_tower_stands_still_where_nothing_of_it_learns():
    tower = Tower()
    assert still(tower)
    assert not still(tower.requires_grad_(True))


def test_an_album_that_memory_cannot_hold_is_refused_before_it_is_begun(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**30})())
    refuse_large(2**10, 3, 2**9, 2**8)  # 2^10 volumes, as they are and 3 more, 2^17 numbers of 2 bytes: just 1 GiB
    with pytest.raises(ValueError, match=r"data.looks=4 .* of 1024 volumes' pictures: 1.2 GiB in 1 .* 1.0 are free"):
        refuse_large(2**10, 4, 2**9, 2**8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"data.looks=3 .*: 2.0 GiB in 2 processes"):
        refuse_large(2**10, 3, 2**9, 2**8)
