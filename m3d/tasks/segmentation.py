"""Masks by name and by description: every ``[SEG]`` of the answer draws the mask of the name said just before it."""

from data_prep.record import NEEDS, Record
from m3d.tasks.base import Phrases, Rendered, ask, description, slot
from m3d.tasks.codecs import BoxCodec
from m3d.tasks.naming import SEG, join, named_masks, names_before

__all__ = ["SEG", "Refer", "Segment", "join", "named_masks", "names_before"]


def _draw(record: Record, say: Phrases, wording: str) -> str:
    """The part of an answer that draws all of the record's masks."""
    names = [mask.name for mask in record.target.masks or ()]
    if not all(name.strip() for name in names):
        raise ValueError(f"record {record.id}: a mask without a name needs target.text with one {SEG} a mask")
    return say(wording, "answer", masks=say.join([f"{name} {SEG}" for name in names]))


def _own_answer(record: Record) -> Rendered | None:
    """The answer that the record brings in ``target.text``, with the masks that it draws; the prompt is still empty."""
    text, masks = record.target.text, record.target.masks or ()
    if text is None:
        return None
    if text.count(SEG) != len(masks):
        raise ValueError(
            f"record {record.id}: target.text has {text.count(SEG)} {SEG} for {len(masks)} masks; write one a mask"
        )
    return Rendered("", text, tuple(mask.name for mask in masks))


class Segment:
    """``seg.sem``: one or more names in the prompt, ``name [SEG]`` for each in the answer.

    A record whose ``masks`` are an empty tuple is answered by the plain statement that they are not there. A name that
    is asked for beside others and has no mask is refused: a missing contour is no absence.
    """

    name = "seg.sem"
    needs = NEEDS["seg.sem"]

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask for the record's masks; a record without masks says that its object is absent."""
        asked, prompt = self._asked(record), record.prompt.text
        if prompt is None:
            prompt = say(self.name, "prompt", names=say.join([say.named(name) for name in asked]))
        own = _own_answer(record)
        if own is not None:
            return Rendered(prompt, own.answer, own.masks)
        present = tuple(mask.name for mask in record.target.masks or ())
        if present:
            missing = sorted(set(asked) - set(present))
            if missing:
                raise ValueError(
                    f"record {record.id}: prompt.slots asks for {', '.join(missing)} beside {', '.join(present)}, "
                    "but has no such mask; ask for what is certainly absent in a record of its own"
                )
            return Rendered(prompt, _draw(record, say, self.name), present)
        if not asked:
            raise ValueError(f"record {record.id}: prompt.text asks for something absent; give target.text too")
        return Rendered(prompt, " ".join(say(self.name, "absent", name=name) for name in asked))

    @staticmethod
    def _asked(record: Record) -> list[str]:
        several = record.prompt.slots.get("objects")
        if several is None:
            one = slot(record, "object")
            return [one] if one else []
        if isinstance(several, str) or not several:
            raise ValueError(f"record {record.id}: prompt.slots.objects must be a list of names, got {several!r}")
        return [str(name) for name in several]

    def parse(self, text: str, codec: BoxCodec) -> list[str]:
        """The names of the masks drawn, in order."""
        return named_masks(text)


class Refer:
    """``seg.ref``: a description in the prompt, the name of what it means and its ``[SEG]`` in the answer.

    A question of the record's own (``slots.question``, as M3D-RefSeg has) is asked as it stands. ``target.text`` is
    the answer where it is given (``It is liver, [SEG].``); it must have one ``[SEG]`` a mask.
    """

    name = "seg.ref"
    needs = NEEDS["seg.ref"]

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask for what the description means; a record without masks says that nothing fits it."""
        if "question" in record.prompt.slots:
            prompt = slot(record, "question")
        else:
            prompt = ask(record, say, self.name, description=description(record))
        own = _own_answer(record)
        if own is not None:
            return Rendered(prompt, own.answer, own.masks)
        if not record.target.masks:
            return Rendered(prompt, say(self.name, "absent"))
        return Rendered(prompt, _draw(record, say, self.name), tuple(mask.name for mask in record.target.masks))

    def parse(self, text: str, codec: BoxCodec) -> list[str]:
        """The names of the masks drawn, in order."""
        return named_masks(text)
