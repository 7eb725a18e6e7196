"""Scan: look once, ask often. The volume is encoded once and the language model's cache of it is kept.

How it talks is in `m3d.inference.talking`, how it draws in `m3d.inference.drawing`, and how both become a `Result` in
`m3d.inference.answering`.
"""

# C = width of the mask head, (D, H, W) = the prepared grid

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.boxes import Box
from data_prep.preprocess import Prepared
from data_prep.volume import Volume
from m3d.inference.answering import answer, answer_all, draw_each, draw_named, draw_pointed, zoomed_in
from m3d.inference.drawing import draw, geometry_prompts
from m3d.inference.postprocess import PostProcess
from m3d.inference.presence import Presence
from m3d.inference.prompting import Point, ScanFrame
from m3d.inference.results import FoundMask, Result
from m3d.inference.session import Session
from m3d.inference.talking import MAX_NEW_TOKENS, Asked, NoMask, asked_to_draw, encode, log_likelihoods, stripped
from m3d.inference.zooming import Zoom, ZoomIn
from m3d.models import M3DForConditionalGeneration, M3DProcessor, M3DVolumeFeatures
from m3d.tasks.base import Phrases
from segvol_head import Prompts

__all__ = ["MAX_NEW_TOKENS", "NoMask", "Scan"]


@dataclass(frozen=True, eq=False)
class Scan:
    """One volume, already looked at; every method returns a `Result` on the scan's own grid."""

    model_id: str
    model: M3DForConditionalGeneration
    processor: M3DProcessor
    prepared: Prepared
    features: M3DVolumeFeatures
    prefix: Any
    path: Path | None = None
    presence: Presence | None = None

    @classmethod
    def of(
        cls,
        model_id: str,
        model: M3DForConditionalGeneration,
        processor: M3DProcessor,
        volume: Volume,
        path: Path | None = None,
    ) -> "Scan":
        """Prepare and encode a volume, and let the language model read it once."""
        return cls.of_prepared(model_id, model, processor, processor.preprocess.apply(volume), path)

    @classmethod
    def of_prepared(
        cls,
        model_id: str,
        model: M3DForConditionalGeneration,
        processor: M3DProcessor,
        prepared: Prepared,
        path: Path | None = None,
    ) -> "Scan":
        """Encode a volume that lies on the model's grid already, as a store keeps it."""
        features, prefix = cls.encode(model, processor, processor.pixels(prepared))
        return cls(model_id, model, processor, prepared, features, prefix, path)

    encode = staticmethod(encode)

    def blinded(self) -> "Scan":
        """The same scan with every voxel zero: what the model says without looking, for honest comparison.

        Its header stays: how long the scan is can be told without looking.
        """
        source = np.zeros_like(self.volume.array)
        return self._instead(np.zeros(self.prepared.shape, np.float32), source, "blind")

    def shown(self, array: npt.NDArray[np.float32]) -> "Scan":
        """The same scan, of which the model is shown another picture on its grid, ``(D, H, W)`` in [0, 1].

        Raises:
            ValueError: The picture has another shape.
        """
        if array.shape != self.prepared.shape:
            raise ValueError(f"the picture has shape {array.shape}, the model's grid {self.prepared.shape}")
        lo, hi = self.prepared.intensity["lo"], self.prepared.intensity["hi"]
        source = self.prepared.to_scan(array) * np.float32(hi - lo) + np.float32(lo)
        return self._instead(array, source, "shown another picture")

    def _instead(self, array: npt.NDArray[np.float32], source: npt.NDArray[np.float32], how: str) -> "Scan":
        prepared = replace(self.prepared, array=array, source=replace(self.volume, array=source))
        features, prefix = self.encode(self.model, self.processor, torch.from_numpy(array)[None])
        return replace(self, model_id=f"{self.model_id} ({how})", prepared=prepared, features=features, prefix=prefix)

    @property
    def volume(self) -> Volume:
        """The scan as it was read."""
        return self.prepared.source

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the answers should know of how the scan was prepared."""
        return self.prepared.warnings

    def ask(self, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> Result:
        """Ask anything; boxes and masks that the answer speaks of come with it, and the measures that it rests on.

        Raises:
            ValueError: The question is empty.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        return answer(self, "ask", question.strip(), max_new_tokens)

    def ask_many(
        self, questions: Sequence[str], *, max_new_tokens: int = MAX_NEW_TOKENS, keep_logits: bool = False
    ) -> Iterator[Result]:
        """Ask several things at once, which takes much less time than one after another; see `ask`.

        The answers are those of `ask`, to rounding, and come one by one, so that masks need not stay in memory. With
        ``keep_logits`` those of an answer keep their logits on the grid.

        Raises:
            ValueError: A question is empty.
        """
        asked = [question.strip() for question in questions]
        if not all(asked):
            raise ValueError(f"question {asked.index('') + 1} of {len(asked)} is empty")
        return answer_all(self, "ask", asked, max_new_tokens, keep_logits=keep_logits) if asked else iter(())

    def report(self, *, max_new_tokens: int = MAX_NEW_TOKENS) -> Result:
        """Write the scan's report."""
        return answer(self, "report", Phrases()("report", "prompt"), max_new_tokens)

    def locate(self, name: str) -> Result:
        """Find a structure: its box in voxels of the scan and in mm, or the answer that it is not there."""
        prompt = Phrases()("rec.box3d", "prompt", name=stripped(name))
        return answer(self, "locate", prompt, MAX_NEW_TOKENS, stripped(name))

    def segment(
        self,
        name: str | Sequence[str] | None = None,
        *,
        points: Sequence[Point] | None = None,
        box: Box | None = None,
        frame: ScanFrame = "voxel",
        postprocess: PostProcess | None = None,
        zoom: Zoom = False,
    ) -> Result:
        """Draw a structure by name, by points and a box, or by both together; or several structures by their names.

        A point is ``((d, h, w), label)``, label 1 inside and 0 outside the structure; in ``frame`` "mm" it is
        ``((x, y, z), label)`` in patient coordinates (RAS). A box has its own frame.

        With ``zoom`` what is drawn on the model's grid is looked at again from closer: in windows of a grid that is so
        many times finer, or as fine as the scan (True or "native"). docs/segmentation.md tells when that helps.

        Of several names each has one mask, as if it were asked for alone; `Result.not_drawn` has those that the model
        refuses. ``postprocess`` is done to the masks; see `Result.postprocessed`.

        Raises:
            NoMask: The model answered a name that was given alone without drawing, or drew something else.
            ValueError: Nothing was asked for, a point or box lies outside the scan, or is given with several names, or
                there is too little memory to zoom in.
        """
        how = postprocess or PostProcess()
        pointed = partial(geometry_prompts, self.prepared, points or [], box, frame=frame)
        closer = ZoomIn(self.model, self.prepared, zoom, lambda way: pointed(way=way)) if zoom is not False else None
        if name is not None and not isinstance(name, str):
            if points or box is not None:
                raise ValueError(
                    f"points and a box are about one structure, and a list of {len(name)} names is given; "
                    "ask for each by itself, or take a session"
                )
            return zoomed_in(draw_each(self, name, closer), closer).postprocessed(how)
        geometry = pointed()
        if name is not None:
            return zoomed_in(draw_named(self, name, geometry, closer), closer).postprocessed(how)
        if geometry is None:
            raise ValueError("say what to segment: a name, points, a box, or several of them")
        return zoomed_in(draw_pointed(self, _label(points, box), geometry, closer), closer).postprocessed(how)

    def segment_all(
        self,
        vocabulary: Sequence[str] | None = None,
        *,
        postprocess: PostProcess | None = None,
        zoom: Zoom = False,
    ) -> Result:
        """Draw every structure that the model has learned, or every one of a vocabulary of your own; see `segment`.

        Label maps number them in the vocabulary's order, what is not drawn too.

        Raises:
            ValueError: There is no vocabulary: none is given, and the checkpoint has none.
        """
        names = self.vocabulary if vocabulary is None else vocabulary
        if not names:
            raise ValueError(
                f"{self.model_id} does not say which structures it has learned (seg_config.vocabulary in its "
                "config.json is empty); name those that you want"
            )
        return self.segment(names, postprocess=postprocess, zoom=zoom)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The structures that the model has learned to draw, as far as its checkpoint says."""
        seg = self.model.config.seg
        return () if seg is None else tuple(seg.vocabulary or ())

    def session(self, *, feedback: bool | None = None) -> Session:
        """Draw interactively: points, boxes, scribbles, names and masks are added one by one, and taken back.

        With ``feedback`` the answer so far is a prompt of the next; None means where the model has learned that.

        Raises:
            ValueError: The model has no mask head, or cannot take ``feedback``.
        """
        return Session(self, feedback=feedback)

    def log_likelihoods(self, prompt: str, answers: Sequence[str]) -> tuple[float, ...]:
        """How likely the model finds each answer to a prompt: the log probabilities of its tokens added up, in nats.

        Raises:
            ValueError: There is no answer to judge.
        """
        return log_likelihoods(self, prompt, answers)

    def asked_to_draw(self, names: Sequence[str]) -> Iterator[Asked]:
        """What the model says to each name that it is asked to draw."""
        return asked_to_draw(self, names)

    def text_prompt(self, name: str) -> Tensor:
        """What the language model tells the mask head of a name, ``(1, C)``.

        Raises:
            NoMask: The model answered the name without drawing, or would draw something else.
        """
        (asked,) = self.asked_to_draw([name])
        return asked.willing().text_prompt

    def draw_one(
        self, name: str, *, text: Tensor | None, geometry: Prompts | None
    ) -> tuple[FoundMask, tuple[str, ...]]:
        """One mask with its logits on the grid, and what to beware of, of a `text_prompt`, of geometry, or of both."""
        (mask,), notes = draw(self, [name], text, geometry, keep_logits=True)
        return mask, notes


def _label(points: Sequence[Point] | None, box: Box | None) -> str:
    return "prompted by " + " and ".join(kind for kind, given in (("points", points), ("box", box)) if given)
