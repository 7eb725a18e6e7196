"""Ask a model all that a run asks: one scan after another, looked at once, its questions answered together.

Every batch of answers is on disk before the next is asked, so that a run that is killed goes on where it was, in as
many processes as one likes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_prep.atomic import atomic_path
from data_prep.record import Record
from data_prep.volume import BadScan
from m3d.bench.cases import BenchCase, Opened, Question
from m3d.bench.config import BenchConfig
from m3d.bench.kinds import TEXT
from m3d.bench.mask_files import keep_mask
from m3d.bench.metrics.registry import kind_of
from m3d.bench.predictions import SIGHTS, DrawnMask, Key, Part, Prediction, Sight, gathered, match_names
from m3d.bench.prompted import Prompting
from m3d.bench.published import soft_sums
from m3d.inference.load import M3D
from m3d.inference.results import FoundMask, Result
from m3d.inference.scan import Scan
from m3d.tasks import TASKS, render
from m3d.tasks.base import Rendered
from m3d.tasks.codecs import Frac3
from m3d.tasks.evidence import ANSWER
from m3d.tasks.vqa import LETTERS

log = logging.getLogger(__name__)

__all__ = ["RUN", "ask_cases", "begin", "read_run"]

RUN = "run.json"
IMPOSSIBLE = -1e9  # nats: JSON has no infinity
UNREAD = "BadScan: its files cannot be read; the log of the run says why"  # without the path, which may name a patient


def begin(folder: Path, about: dict[str, Any]) -> None:
    """Write what the run is, or see that the one that was begun here is the same.

    Raises:
        ValueError: Another run was begun here; the message says in what it differs.
    """
    if not (folder / RUN).is_file():
        if gathered(folder):
            raise ValueError(f"{folder} holds answers, but no {RUN} that says whose; give another --out, or remove it")
        with atomic_path(folder / RUN) as temporary:
            text = json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False)
            temporary.write_text(f"{text}\n", encoding="utf-8")
    known = read_run(folder)  # also where it was just written: another process may have been quicker
    differs = sorted(key for key in {*known, *about} - {"machine", "where"} if known.get(key) != about.get(key))
    if differs:
        others = ", ".join(f"another {key}" for key in differs)
        raise ValueError(f"{folder} holds a run of {others}; give another --out, or remove it")


def read_run(folder: Path) -> dict[str, Any]:
    """What a run says of itself.

    Raises:
        FileNotFoundError: The folder holds none.
    """
    path = folder / RUN
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: this is no run; `m3d bench run CONFIG ... --out {folder}` makes one"
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def ask_cases(
    model: M3D,
    cases: Sequence[BenchCase],
    config: BenchConfig,
    folder: Path,
    *,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[Iterable[BenchCase]], Iterable[BenchCase]] | None = None,
) -> int:
    """Ask this process's share of the cases what has not been answered yet; how many answers were added.

    A scan that cannot be read is a failure of all its records, by name.
    """
    sights: tuple[Sight, ...] = SIGHTS if config.blind else SIGHTS[:1]
    done, part, added = set(gathered(folder)), Part(folder, rank), 0
    own = [case for case in cases[rank::world] if _open_questions(case, sights, done)]
    show = progress or (lambda some: tqdm(some, unit="scan", disable=rank > 0))
    try:
        for case in show(own):
            for answers in _ask_case(model, case, cases, config, folder, _open_questions(case, sights, done)):
                part.add(answers)
                added += len(answers)
    finally:
        part.close()
    return added


def _open_questions(case: BenchCase, sights: Sequence[Sight], done: Set[Key]) -> dict[Sight, list[Question]]:
    found = {sight: [one for one in case.questions if (one.name, sight) not in done] for sight in sights}
    return {sight: questions for sight, questions in found.items() if questions}


def _ask_case(
    model: M3D,
    case: BenchCase,
    cases: Sequence[BenchCase],
    config: BenchConfig,
    folder: Path,
    asked: dict[Sight, list[Question]],
) -> Iterator[list[Prediction]]:
    try:
        opened = case.open()
        prepared = opened.prepared(model.processor.preprocess)
    except BadScan as error:
        log.warning("%s", error)
        yield [_unread(question, sight) for sight, some in asked.items() for question in some]
        return
    scan = Scan.of_prepared(model.id, model.model, model.processor, prepared)
    for sight, questions in asked.items():
        try:
            seen = scan if sight == "seeing" else _twin(scan, case, cases, config)
        except BadScan as error:
            log.warning("what the twin of %s is shown: %s", case.id, error)
            yield [_unread(question, sight) for question in questions]
            continue
        asking = _Asking(seen, opened, config, folder, sight)
        prompting = Prompting(seen, opened, config, folder, sight)
        for limit in sorted({config.tasks[one.record.task].max_new_tokens for one in questions}):
            alike = [one for one in questions if config.tasks[one.record.task].max_new_tokens == limit]
            alike.sort(key=lambda one: (one.record.task, one.record.subtask or ""))
            worded = [one.record for one in alike if one.by == TEXT]
            for first in range(0, len(worded), config.batch):
                yield asking.answers(worded[first : first + config.batch], limit)
            yield from prompting.answers([one for one in alike if one.by != TEXT], limit)


def _unread(question: Question, sight: Sight) -> Prediction:
    return Prediction.of(question.record, sight, question.by, failure=UNREAD)


def _twin(scan: Scan, case: BenchCase, cases: Sequence[BenchCase], config: BenchConfig) -> Scan:
    """The scan as its blind twin sees it: not at all, or as that of the next patient."""
    if config.blind == "zeros":
        return scan.blinded()
    place = next(number for number, one in enumerate(cases) if one is case)
    patient = case.stored.image.patient_id
    other = next(one for one in [*cases[place + 1 :], *cases[:place]] if one.stored.image.patient_id != patient)
    return scan.shown(other.open().prepared(scan.processor.preprocess).array)


@dataclass(frozen=True, eq=False)
class _Asking:
    """One scan as it is seen, and where its answers go."""

    scan: Scan
    opened: Opened
    config: BenchConfig
    folder: Path
    sight: Sight

    def answers(self, records: Sequence[Record], limit: int) -> list[Prediction]:
        """Ask several records at once."""
        began = time.monotonic()
        said = [render(TASKS, record, codec=Frac3()) for record in records]
        results = self.scan.ask_many(
            [one.prompt for one in said],
            max_new_tokens=limit,
            keep_logits=any(kind_of(record.task) == "masks" for record in records),
        )
        found = [self._prediction(*one) for one in zip(records, said, results, strict=True)]
        each = round((time.monotonic() - began) / len(records), 4)
        return [replace(one, seconds=each) for one in found]

    def _prediction(self, record: Record, asked: Rendered, result: Result) -> Prediction:
        boxes = tuple(
            tuple(
                round(side / length, 9)
                for side, length in zip((*box.voxel.lo, *box.voxel.hi), self.opened.shape * 2, strict=True)
            )
            for box in result.boxes
        )
        drawn = self._drawn(record, result) if kind_of(record.task) == "masks" else ()
        return Prediction.of(
            record,
            self.sight,
            prompt=asked.prompt,
            text=result.text,
            evidence=result.evidence,
            boxes=boxes,
            masks=drawn,
            likelihoods=self._likelihoods(record, asked, result),
            failure=_failure(record, result, drawn),
        )

    def _likelihoods(self, record: Record, asked: Rendered, result: Result) -> tuple[float, ...]:
        """How likely each option is behind the evidence that the answer gave."""
        options = record.target.options
        if kind_of(record.task) != "choice" or options is None or not self.config.likelihoods:
            return ()
        lettered = asked.answer not in options
        lead = f"{result.evidence}. {ANSWER} " if result.evidence else ""
        answers = [
            f"{lead}{LETTERS[number]}. {option}" if lettered else f"{lead}{option}"
            for number, option in enumerate(options)
        ]
        found = self.scan.log_likelihoods(asked.prompt, answers)
        return tuple(round(max(one, IMPOSSIBLE), 4) for one in found)

    def _drawn(self, record: Record, result: Result) -> tuple[DrawnMask, ...]:
        """Keep the masks of an answer, not what it measured; what a record asks for gets its soft sums."""
        own = result.masks[result.num_measured :]
        truths = record.target.masks or ()
        matched = match_names([truth.name for truth in truths], [mask.name for mask in own])
        where = {number: place for place, number in enumerate(matched) if number is not None}
        found = []
        for number, mask in enumerate(own):
            soft = self._soft(record, where[number], mask) if number in where else None
            file = None
            if self.config.keep_masks:
                like = self.opened.volume
                file = keep_mask(self.folder, Question(record), self.sight, number, mask.name, mask.array, like)
            found.append(DrawnMask(name=mask.name, file=file, soft=soft))
        return tuple(found)

    def _soft(self, record: Record, number: int, mask: FoundMask) -> tuple[float, float, float] | None:
        """Sums of p t, p and t on the model's own grid, as the released Dice needs them."""
        assert mask.logits is not None
        truth = torch.from_numpy(self.scan.prepared.mask_to_grid(self.opened.mask(record, number)))
        overlap, guess, true = soft_sums(torch.from_numpy(mask.logits)[None], truth[None])[0].tolist()
        return overlap, guess, true


def _failure(record: Record, result: Result, drawn: Sequence[DrawnMask]) -> str | None:
    """Why an answer is none, by name; it is judged all the same, at its worst."""
    if not result.text.strip():
        cut = next((note for note in result.warnings if "broken off" in note), "")
        return f"NoAnswer: {cut}" if cut else "NoAnswer: nothing was said"
    kind = kind_of(record.task)
    if kind == "masks" and record.target.masks and not drawn:
        return "NoMask: the answer has no [SEG]"
    if kind == "boxes" and record.target.boxes and not result.boxes:
        return "NoBox: the answer has no box"
    return None
