"""Two gloo processes under DDP lose and learn what one process does on the joined batch, InfoNCE and SigLIP alike.

Run as a script, this file is one of the two processes.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import m3d  # isort: skip  # the torchvision remedy comes before transformers

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from encoders import ViT3D, VolumeTextCLIP
from m3d.train.contrastive import START, ContrastiveConfig, ContrastivePair

PAIRS, WORLD, WIDTH = 6, 2, 8
assert m3d.__file__ is not None


class Reader(nn.Module):
    """A text tower of one table and one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.layer(self.table(input_ids)).tanh())


def objective(kind: str, chunk: int) -> ContrastivePair:
    torch.manual_seed(0)
    vision = ViT3D(image_size=(4, 4, 4), patch_size=(2, 2, 2), hidden_size=WIDTH, mlp_dim=16, num_layers=1, num_heads=2)
    scale, bias = START[kind]
    widths = {"vision_width": WIDTH, "text_width": WIDTH, "shared_width": WIDTH}
    model = VolumeTextCLIP(vision, Reader(), text_pooling="mean", scale=scale, bias=bias, **widths)
    return ContrastivePair(model, ContrastiveConfig(kind=kind, chunk=chunk))


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.rand(PAIRS, 1, 4, 4, 4, generator=generator),
        "input_ids": torch.randint(20, (PAIRS, 5), generator=generator),
        "attention_mask": torch.ones(PAIRS, 5, dtype=torch.long),
    }


def learn(module: nn.Module, inside: nn.Module, given: dict[str, Tensor], world: int) -> dict[str, Tensor]:
    """Loss and gradients, divided as the trainer divides: by the pairs of all processes, times their number."""
    total = module(given)["contrastive"].total
    (total * world / PAIRS).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in inside.named_parameters()}
    return gradients | {"loss": (total / PAIRS).detach()}


def process(kind: str, chunk: int, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORLD)
    share = PAIRS // WORLD
    mine = {name: one[rank * share : (rank + 1) * share] for name, one in batch().items()}
    inside = objective(kind, chunk)
    save_file(learn(DistributedDataParallel(inside), inside, mine, WORLD), folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "chunk"), [("infonce", 0), ("infonce", 2), ("siglip", 0)])
def test_two_processes_are_one(kind, chunk, tmp_path):
    command = [sys.executable, __file__, kind, str(chunk), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    both = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(WORLD)]
    assert [one.wait(timeout=240) for one in both] == [0, 0]

    whole = objective(kind, 0)
    expected = learn(whole, whole, batch(), 1)
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(WORLD)]
    torch.testing.assert_close(sum(rank["loss"] for rank in ranks), expected.pop("loss"))
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        for rank in ranks:
            torch.testing.assert_close(rank[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_the_negatives_of_the_other_process_count():
    """Otherwise the test above would also pass for losses that look at a process's own pairs alone."""
    whole, share = objective("infonce", 0), PAIRS // WORLD
    joined = whole(batch())["contrastive"].total / PAIRS
    halves = [
        whole({name: one[i : i + share] for name, one in batch().items()})["contrastive"].total / PAIRS
        for i in (0, share)
    ]
    assert joined > sum(halves) + 0.1


if __name__ == "__main__":
    torch.set_num_threads(1)
    process(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
