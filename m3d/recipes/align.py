"""Stage 1: perceiver and new tokens learn to speak to a frozen language model (M3D-LaMed, section 4.2).

``m3d train configs/tiny/align.yaml``. Reports and questions alone; nothing is drawn. The result is ``OUTPUT/model``.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from m3d.recipes.parts import Parts
from m3d.recipes.talk import TalkConfig, run
from m3d.train.objective import LossWeights
from m3d.train.optim import OptimConfig


def published_optim() -> OptimConfig:
    """Section 4.2: batch 12 x 8 [16 x 8 in the script], lr 1e-4, 3 epochs; the rest as in pretrain.sh."""
    return OptimConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, epochs=3, batch=96, micro_batch=12, bf16=True)


@dataclass(frozen=True, kw_only=True)
class Config(TalkConfig):
    """Everything the stage can be told; see `m3d.recipes.talk.TalkConfig`."""

    stage: Literal["align"] = "align"
    output: str = "runs/align"
    parts: Parts = field(default_factory=Parts)
    loss: LossWeights = field(default_factory=lambda: LossWeights(dice=0.0, bce=0.0, prompted=0.0))
    optim: OptimConfig = field(default_factory=published_optim)

    def __post_init__(self) -> None:
        """Refuse a mask loss where nothing that draws learns, and a frozen perceiver."""
        super().__post_init__()
        if self.parts.perceiver == "frozen":
            raise ValueError("parts.perceiver=frozen: alignment is about the perceiver; use the instruct stage")
        if self.parts.seg_head == "frozen" and max(self.loss.dice, self.loss.bce, self.loss.prompted) > 0:
            raise ValueError("loss.dice, loss.bce and loss.prompted must be 0 while parts.seg_head is frozen")


def main(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Teach the perceiver to speak; the manifest of what came of it."""
    return run(config, resume=resume)
