"""An interactive session: a person points, the mask follows, and every step can be taken back.

    session = m3d.load("m3d-tiny").look("ct.nii.gz").session()
    tumour = session.object("tumour")
    tumour.add_point((61, 40, 52))
    step = tumour.add_point((61, 47, 52), positive=False)
    print(step.score, step.changed, step.milliseconds)
    tumour.undo()
    session.result().save("out")

The scan was looked at before; a step costs one pass of the mask decoder and the way back to the scan's voxels.
"""

# (D, H, W) = the scan's voxels, (d, h, w) = the model's grid, C = width of the mask head

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_prep.boxes import Box
from m3d.inference.history import Given, History, Mask, Refined, Step
from m3d.inference.prompting import (
    Place,
    ScanFrame,
    as_prompts,
    in_words,
    mask_logits,
    place_box,
    place_points,
    refuse_contradictions,
    slice_box,
    spread,
    unseen,
)
from m3d.inference.results import FoundMask, Result
from m3d.models.modeling import NO_HEAD

if TYPE_CHECKING:
    from m3d.inference.scan import Scan

__all__ = ["Given", "Refined", "Session", "SessionObject"]

SCRIBBLE_POINTS = 5


class Session:
    """Several objects in one scan, each with prompts and a history of its own."""

    def __init__(self, scan: Scan, *, feedback: bool | None = None) -> None:
        head = scan.model.seg_head
        if head is None or scan.features.seg_tokens is None:
            raise ValueError(NO_HEAD)
        self.scan = scan
        self.takes_masks = head.prompt_encoder.mask_embedding is not None
        if feedback and not self.takes_masks:
            raise ValueError(f"{scan.model_id} {_NO_MASK_PROMPT}; leave out feedback")
        self.feedback = self.takes_masks if feedback is None else feedback
        self._objects: dict[str, SessionObject] = {}
        self._texts: dict[str, Tensor] = {}

    @property
    def objects(self) -> tuple[SessionObject, ...]:
        """All objects, in the order in which they were first spoken of."""
        return tuple(self._objects.values())

    def object(self, name: str = "object") -> SessionObject:
        """The object of that label, a new one where there is none yet; the label alone prompts nothing."""
        label = name.strip()
        if not label:
            raise ValueError("the object's label is empty; name it, such as 'tumour', or leave it out")
        if label not in self._objects:
            self._objects[label] = SessionObject(self, label)
        return self._objects[label]

    def remove(self, name: str) -> None:
        """Forget an object and its history.

        Raises:
            ValueError: There is none of that label.
        """
        if name not in self._objects:
            raise ValueError(f"no object {name!r} in this session; there are: {', '.join(self._objects) or 'none'}")
        del self._objects[name]

    def reset(self) -> None:
        """Forget all objects; the scan stays looked at, and names that were asked for stay answered."""
        self._objects.clear()

    def text_prompt(self, name: str) -> Tensor:
        """What the language model says of a name, ``(1, C)``; it is asked once.

        Raises:
            NoMask: It would not draw that.
        """
        asked = name.strip().lower()
        if asked not in self._texts:
            self._texts[asked] = self.scan.text_prompt(name)
        return self._texts[asked]

    def result(self) -> Result:
        """The masks of all objects that have prompts, with what each was prompted by, as an answer that can be saved.

        Raises:
            ValueError: No object has a prompt.
        """
        drawn = [one for one in self.objects if one.current.given]
        if not drawn:
            raise ValueError("no object has a prompt yet; begin with session.object('tumour').add_point((d, h, w))")
        states = [one.current for one in drawn]
        scan = self.scan
        return Result(
            task="session",
            prompt="; ".join(f"{state.mask.name}: {state.given}" for state in states),
            text="",
            boxes=(),
            masks=tuple(state.mask for state in states),
            volume=scan.volume,
            scan_path=scan.path,
            model_id=scan.model_id,
            preprocess=scan.processor.preprocess.to_dict(),
            warnings=(*scan.warnings, *dict.fromkeys(note for state in states for note in state.notes)),
            seconds=sum(one.milliseconds for one in drawn) / 1000,
        )


class SessionObject:
    """One object of a session. A prompt that is refused leaves it as it was.

    Points add up; a box, a name or a mask takes the place of the one before.
    """

    def __init__(self, session: Session, label: str) -> None:
        self.session, self.label = session, label
        self.milliseconds = 0.0
        self._history = History(session.scan.volume.shape)
        self.current = self._refined(None, 0.0)

    # -- saying more ----------------------------------------------------------------------------------------------

    def add_point(self, at: Sequence[float], *, positive: bool = True, frame: ScanFrame = "voxel") -> Refined:
        """Point at a voxel ``(d, h, w)``, or at ``(x, y, z)`` in mm, inside the object or outside it.

        Raises:
            ValueError: It lies outside the scan, or contradicts what was said before.
        """
        began = time.perf_counter()
        return self._add_points(place_points([at], self._scan.volume, frame=frame), positive, began)

    def add_scribble(
        self,
        places: Sequence[Sequence[float]] | npt.NDArray[np.generic],
        *,
        positive: bool = True,
        frame: ScanFrame = "voxel",
        most: int = SCRIBBLE_POINTS,
    ) -> Refined:
        """Draw over many voxels, ``(N, 3)``: at most so many of them that are spread well stand for all.

        Raises:
            ValueError: One lies outside the scan, or one contradicts what was said before.
        """
        began = time.perf_counter()
        volume = self._scan.volume
        drawn = place_points(places, volume, frame=frame, kind="voxel of a scribble")
        given = self.current.given
        refuse_contradictions([*given.points, *((at, int(positive)) for at in drawn)], given.box)
        return self._add_points(spread(drawn, most, volume.spacing), positive, began)

    def add_box(self, box: Box) -> Refined:
        """Frame the object with a half-open box in voxels of the scan or in mm; ``box.frame`` says which.

        Raises:
            ValueError: It is empty, reaches beyond the scan, or leaves a point inside the object out.
        """
        began = time.perf_counter()
        return self._frame(place_box(box, self._scan.volume), began)

    def add_slice_box(
        self, *, axis: int, at: float, lo: Sequence[float], hi: Sequence[float], frame: ScanFrame = "voxel"
    ) -> Refined:
        """Frame the object on one slice: a box that is one voxel thin.

        In voxels ``axis`` is the array's and ``at`` the slice's index; in mm ``axis`` 0, 1, 2 is R, A, S. ``lo`` and
        ``hi`` are the two other sides, in order, half-open.

        Raises:
            ValueError: There is no such slice, or as for `add_box`.
        """
        began = time.perf_counter()
        return self._frame(slice_box(self._scan.volume, axis=axis, at=at, lo=lo, hi=hi, frame=frame), began)

    def add_name(self, name: str | None = None) -> Refined:
        """Say what the object is, in words; its label if none are given. Points and boxes go on to count.

        Another name asks for another thing, so that the mask drawn before is no prompt of this step.

        Raises:
            NoMask: The model knows no such thing, or does not see it.
        """
        began = time.perf_counter()
        name = (self.label if name is None else name).strip()
        self.session.text_prompt(name)
        return self._redraw(replace(self.current.given, name=name), began, anew=True)

    def add_mask(self, mask: npt.NDArray[np.generic]) -> Refined:
        """Begin from a mask on the scan's grid, ``(D, H, W)``: it is the object until the next prompt refines it.

        Raises:
            ValueError: The model cannot take masks; the mask is empty, or not of the scan's shape.
        """
        began = time.perf_counter()
        logits = self._mask_prompt(mask)
        given = replace(self.current.given, mask=logits)
        return self._keep(Step(given=given, logits=logits, score=1.0), np.asarray(mask).astype(bool), began)

    # -- going back -----------------------------------------------------------------------------------------------

    def undo(self) -> Refined:
        """Take the last step back.

        Raises:
            ValueError: There is none.
        """
        began = time.perf_counter()
        return self._show(self._history.undo(), began)

    def redo(self) -> Refined:
        """Take back an undo; a new prompt ends what could be redone.

        Raises:
            ValueError: There is none.
        """
        began = time.perf_counter()
        return self._show(self._history.redo(), began)

    def reset(self) -> Refined:
        """Forget all prompts; this can be undone."""
        began = time.perf_counter()
        return self._keep(Step(), np.zeros(self._scan.volume.shape, dtype=bool), began)

    # -- one step -------------------------------------------------------------------------------------------------

    @property
    def _scan(self) -> Scan:
        return self.session.scan

    def _add_points(self, places: Sequence[Place], positive: bool, began: float) -> Refined:
        given = self.current.given
        points = (*given.points, *((at, int(positive)) for at in places))
        refuse_contradictions(points, given.box)
        return self._redraw(replace(given, points=points), began)

    def _frame(self, box: Box, began: float) -> Refined:
        given = self.current.given
        refuse_contradictions(given.points, box)
        return self._redraw(replace(given, box=box), began)

    def _redraw(self, given: Given, began: float, *, anew: bool = False) -> Refined:
        """Ask the head for the mask of all that was said and, with feedback, of the mask so far."""
        scan = self._scan
        before = self._history.step.logits
        mask = before if self.session.feedback and before is not None and not anew else given.mask
        geometry = as_prompts(scan.prepared, given.points, given.box, mask=mask)
        text = None if given.name is None else self.session.text_prompt(given.name)
        found, notes = scan.draw_one(self.label, text=text, geometry=geometry)
        assert found.logits is not None
        notes += tuple(
            f"point {in_words(at)} lies in a part of the scan that the model does not look at; it was moved to the edge"
            for at, _ in given.points
            if unseen(scan.prepared, at)
        )
        step = Step(given=given, logits=torch.from_numpy(found.logits), score=found.score, notes=notes)
        return self._keep(step, found.array, began)

    def _keep(self, step: Step, array: Mask, began: float) -> Refined:
        return self._show(self._history.add(step, array), began)

    def _show(self, changed: Box | None, began: float) -> Refined:
        milliseconds = (time.perf_counter() - began) * 1000
        self.milliseconds += milliseconds
        self.current = self._refined(changed, milliseconds)
        return self.current

    def _refined(self, changed: Box | None, milliseconds: float) -> Refined:
        array, step = self._history.array, self._history.step
        array.setflags(write=False)
        volume_ml = float(np.count_nonzero(array) * self._scan.volume.voxel_ml)
        mask = FoundMask(self.label, array, step.score, volume_ml)
        return Refined(mask, changed, milliseconds, step.given, step.notes)

    def _mask_prompt(self, mask: npt.NDArray[np.generic]) -> Tensor:
        """A mask on the scan as logits on the grid."""
        given, scan = np.asarray(mask), self._scan
        if not self.session.takes_masks:
            raise ValueError(f"{scan.model_id} {_NO_MASK_PROMPT}; give points, a box or a name")
        if given.shape != scan.volume.shape:
            raise ValueError(
                f"the mask has shape {given.shape}, the scan {scan.volume.shape}; bring it to the scan's grid first"
            )
        if given.dtype != bool and not np.isin(given, (0, 1)).all():
            raise ValueError("the mask has other values than 0 and 1; of a label map give one label, as labels == 3")
        if not given.any():
            raise ValueError("the mask is empty; leave it out, or reset the object to begin anew")
        return mask_logits(scan.prepared, given.astype(bool))


_NO_MASK_PROMPT = "has not learned to use an earlier mask (seg_config.mask_prompt)"
