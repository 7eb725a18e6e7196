"""Is a structure in the scan at all? A probability, fitted to structures that certainly are or are not.

Whatever was answered, the model is made to give both answers to "segment the ...": that it is drawn, and that it is
not there. How much likelier it finds the first, what it then draws, and what the scan looks like there are the `Signs`
of a name. ``presence.json`` of a checkpoint makes a probability of them (Platt 1999, "Probabilistic outputs for support
vector machines", with several scores in place of one): it says how often a structure with such signs was in the scans
that it was fitted to.

`m3d calibrate` writes it, for the weights that lie beside it and no others.
"""

# N = names, R = rows of text, k = signs, (d, h, w) = the model's grid

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from data_prep.atomic import atomic_path
from m3d.inference.checkpoints import weights_sha256
from m3d.inference.results import DOUBT
from m3d.inference.talking import given_answers
from m3d.models.modeling import NO_HEAD
from m3d.models.processing import SEG_TOKEN
from m3d.models.seg_token import find_seg_tokens
from m3d.tasks.base import Phrases

if TYPE_CHECKING:
    from m3d.inference.results import Result
    from m3d.inference.scan import Scan

log = logging.getLogger(__name__)

__all__ = ["PRESENCE_NAME", "Presence", "Signs", "Usual", "fit", "read_presence", "signs_of", "with_presence"]

FORMAT = "m3d.presence/1"
PRESENCE_NAME = "presence.json"
AT_ONCE = 8  # names
TOP = 10  # voxels
LIMIT = 20.0  # nats, and logits: beyond it nothing becomes surer
ODDEST = 6.0  # spreads
FEWEST = 8  # structures of a name, to say what is usual
LEAST_SPREAD = 0.005  # of grey values in [0, 1]
PENALTY = 1e-2  # of squared weights, beside the mean loss: holds weights where the signs part both kinds


@dataclass(frozen=True)
class Signs:
    """What the model gives away of a name.

    ``said``: how much likelier it finds the answer that draws than the one that says "not there", in nats. ``peak``:
    mean of the ten highest logits of the mask. ``extent``: log10(1 + sum of its probabilities), in voxels of the grid.
    ``inside``: mean probability of what is drawn, of the highest voxel where nothing is. ``grey``: mean of the picture
    inside, in [0, 1]; None where nothing is drawn.
    """

    said: float
    peak: float
    extent: float
    inside: float
    grey: float | None

    @classmethod
    def of(cls, said: float, logits: Tensor, picture: Tensor) -> Signs:
        """Those of the two answers' difference in nats, of the mask's logits and of the picture, both ``(d, h, w)``."""
        flat = logits.flatten().float()
        probability, drawn = flat.sigmoid(), flat > 0
        anything = bool(drawn.any())
        return cls(
            said=float(np.clip(said, -LIMIT, LIMIT)),
            peak=float(np.clip(float(flat.topk(min(TOP, len(flat))).values.mean()), -LIMIT, LIMIT)),
            extent=math.log10(1 + float(probability.sum())),
            inside=float(probability[drawn].mean() if anything else probability.max()),
            grey=float(picture.flatten()[drawn].mean()) if anything else None,
        )


@dataclass(frozen=True)
class Usual:
    """The grey of structures of a name that were there: mean and spread (standard deviation)."""

    mean: float
    spread: float

    @classmethod
    def of(cls, greys: Sequence[float]) -> Usual:
        """Of several."""
        return cls(float(np.mean(greys)), max(float(np.std(greys)), LEAST_SPREAD))


WEIGHED = ("said", "peak", "extent", "inside", "odd")
"""What a fit weighs: the signs, and how odd the grey is for the name."""
SENSE = ((0, None), (0, None), (0, None), (0, None), (None, 0))
"""The limits of their weights: a surer model never makes a structure less likely, nor an odder grey one likelier."""


def weighed(name: str, signs: Signs, usual: Mapping[str, Usual]) -> tuple[float, ...]:
    """The signs of a name as they are weighed, in the order of `WEIGHED`.

    ``odd`` is how many spreads the grey lies from what is usual for the name, 6 at most and where nothing is drawn, 0
    where it is not known what is usual.
    """
    known = usual.get(name.casefold())
    if known is None:
        odd = 0.0
    else:
        odd = ODDEST if signs.grey is None else min(abs(signs.grey - known.mean) / known.spread, ODDEST)
    return signs.said, signs.peak, signs.extent, signs.inside, odd


@torch.inference_mode()
def signs_of(scan: Scan, names: Sequence[str]) -> tuple[Signs, ...]:
    """The signs of each name; the model need not know it.

    Raises:
        ValueError: The model has no mask head.
    """
    if scan.model.seg_head is None:
        raise ValueError(NO_HEAD)
    picture = torch.from_numpy(scan.prepared.array)
    found: list[Signs] = []
    for first in range(0, len(names), AT_ONCE):
        some = names[first : first + AT_ONCE]
        said, text = _made_to_answer(scan, some)
        owner = torch.zeros(len(some), dtype=torch.long, device=scan.model.device)
        logits = scan.model.draw(scan.features, text=text, volume_index=owner)[:, 0]
        found += [Signs.of(*one, picture) for one in zip(said, logits.float().cpu(), strict=True)]
    return tuple(found)


def _made_to_answer(scan: Scan, names: Sequence[str]) -> tuple[list[float], Tensor]:
    """How much likelier each name is drawn than denied, in nats, and what the drawing ``[SEG]`` says, ``(N, C)``."""
    say = Phrases()
    prompts = [say("seg.sem", "prompt", names=f"the {name}") for name in names]
    draws = [say("seg.sem", "answer", masks=f"{name} {SEG_TOKEN}") for name in names]
    denies = [say("seg.sem", "absent", name=name) for name in names]
    given = given_answers(scan, list(zip(prompts * 2, draws + denies, strict=True)))
    drawn, denied = given.likelihoods.split(len(names))
    where = find_seg_tokens(given.said[: len(names)], scan.model.config.seg_token_id)
    return (drawn - denied).tolist(), scan.model.seg_prompts(given.states[: len(names)], where)


@dataclass(frozen=True)
class Presence:
    """A fit: ``sigmoid(bias + sum of weight x what is weighed)``.

    ``weights`` are by name of what is `WEIGHED`; ``structures`` are those that it was fitted to and can speak of, and
    ``usual`` is by structure, all in small letters. ``fitted`` says to what: weights, stores, split, n.
    """

    weights: Mapping[str, float]
    bias: float
    structures: tuple[str, ...]
    usual: Mapping[str, Usual] = field(default_factory=dict)
    fitted: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if tuple(self.weights) != WEIGHED:
            raise ValueError(f"it weighs {', '.join(self.weights)}; this version knows {', '.join(WEIGHED)}")
        if not all(map(math.isfinite, (*self.weights.values(), self.bias))):
            raise ValueError("a weight is not a number")
        if not all(math.isfinite(one.mean) and one.spread > 0 for one in self.usual.values()):
            raise ValueError("what is usual for a structure needs a mean and a spread above 0")

    def probability(self, name: str, signs: Signs) -> float:
        """How likely the structure is in the scan, if the fit held for it; whether it does, ``structures`` say."""
        values = zip(self.weights.values(), weighed(name, signs, self.usual), strict=True)
        return float(expit(self.bias + sum(weight * value for weight, value in values)))

    def of(self, scan: Scan, names: Sequence[str]) -> dict[str, float]:
        """How likely each named structure is in a scan; those that the fit does not know are left out."""
        known = [name for name in names if name.casefold() in self.structures]
        return dict(zip(known, map(self.probability, known, signs_of(scan, known)), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, format ``m3d.presence/1``."""
        usual = {name: asdict(one) for name, one in self.usual.items()}
        return {
            "format": FORMAT,
            "weights": dict(self.weights),
            "bias": self.bias,
            "structures": list(self.structures),
            "usual": usual,
            "fitted": dict(self.fitted),
        }

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> Presence:
        """Build from what `to_dict` gave.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: It is something else, or of another version.
        """
        if kept["format"] != FORMAT:
            raise ValueError(f"its format {kept['format']!r} is not {FORMAT}")
        return cls(
            {str(name): float(weight) for name, weight in kept["weights"].items()},
            float(kept["bias"]),
            tuple(map(str, kept["structures"])),
            {str(name): Usual(float(one["mean"]), float(one["spread"])) for name, one in kept["usual"].items()},
            dict(kept["fitted"]),
        )

    def write(self, folder: Path) -> Path:
        """Write ``presence.json`` of a checkpoint, whole or not at all, in the place of an earlier one."""
        path = folder / PRESENCE_NAME
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path


def with_presence(scan: Scan, result: Result, names: Sequence[str]) -> Result:
    """The result with how likely each name that was asked for is in the scan, and a warning where it probably is not.

    The same result where the model has no fit, and nothing of names that its fit does not know. Masks that it drew
    beside those that were asked for, and what is doubted, are kept.
    """
    if scan.presence is None:
        return result
    values = scan.presence.of(scan, names)
    found = {name.casefold(): value for name, value in values.items()}
    doubted = [f"{name} is probably not in the scan ({value:.2f})" for name, value in values.items() if value < DOUBT]
    return replace(
        result,
        masks=tuple(replace(mask, present=found.get(mask.name.casefold())) for mask in result.masks),
        not_drawn=tuple(replace(one, present=found.get(one.name.casefold())) for one in result.not_drawn),
        warnings=(*result.warnings, *doubted),
    )


def read_presence(folder: Path) -> Presence | None:
    """The fit of a checkpoint; None where it has none, or, with a warning, one of other weights.

    Raises:
        ValueError: ``presence.json`` is broken, or of another version.
    """
    path = folder / PRESENCE_NAME
    if not path.is_file():
        return None
    try:
        found = Presence.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: {what}; `m3d calibrate {folder} --data STORE --force` makes it anew, or remove it"
        ) from error
    if found.fitted.get("weights_sha256") != weights_sha256(folder):
        log.warning("%s was fitted to other weights and is not used; run `m3d calibrate %s` again", path, folder)
        return None
    return found


def fit(
    names: Sequence[str], signs: Sequence[Signs], there: Sequence[bool], fitted: Mapping[str, Any] | None = None
) -> Presence:
    """Logistic regression of presence on what is `WEIGHED`, with Platt's targets and a small penalty on the weights.

    Weights keep to their `SENSE`.

    Raises:
        ValueError: Only one kind was given: structures that are there, or structures that are not.
    """
    is_there = np.array(there, bool)
    if is_there.all() or not is_there.any():
        raise ValueError(
            f"of {len(is_there)} structures {int(is_there.sum())} are certainly there and {int((~is_there).sum())} are "
            "certainly not; a fit needs both: give a store whose labels are complete, such as phantoms"
        )
    usual = _usual(names, signs, there)
    table = np.array([weighed(*one, usual) for one in zip(names, signs, strict=True)])
    mean, scale = table.mean(axis=0), table.std(axis=0)
    scale[scale == 0] = 1.0
    ready = np.column_stack([(table - mean) / scale, np.ones(len(table))])
    positive = int(is_there.sum())
    targets = np.where(is_there, (positive + 1) / (positive + 2), 1 / (len(is_there) - positive + 2))
    limits = (*SENSE, (None, None))
    begin = np.zeros(ready.shape[1])
    found = minimize(_loss, begin, args=(ready, targets), jac=True, method="L-BFGS-B", bounds=limits)
    *slopes, level = found.x
    weights = np.array(slopes) / scale
    by_name = dict(zip(WEIGHED, map(float, weights), strict=True))
    known = tuple(sorted({name.casefold() for name in names}))
    return Presence(by_name, float(level - weights @ mean), known, usual, dict(fitted or {}))


def _usual(names: Sequence[str], signs: Sequence[Signs], there: Sequence[bool]) -> dict[str, Usual]:
    """What is usual for each name, of those that are there and drawn; nothing where they are few."""
    greys: dict[str, list[float]] = {}
    for name, one, is_there in zip(names, signs, there, strict=True):
        if is_there and one.grey is not None:
            greys.setdefault(name.casefold(), []).append(one.grey)
    return {name: Usual.of(some) for name, some in sorted(greys.items()) if len(some) >= FEWEST}


def _loss(
    weights: npt.NDArray[np.float64], signs: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]
) -> tuple[float, npt.NDArray[np.float64]]:
    """Mean cross-entropy with its penalty, and the gradient; the last weight is the bias, which is free."""
    score = signs @ weights
    held = np.append(weights[:-1], 0.0)
    loss = np.mean(np.logaddexp(0, score) - targets * score) + PENALTY / 2 * held @ held
    return float(loss), signs.T @ (expit(score) - targets) / len(score) + PENALTY * held
