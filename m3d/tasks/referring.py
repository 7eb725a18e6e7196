"""Where is it, and what is it: referring expression comprehension (a box for words) and generation (the reverse)."""

from dataclasses import replace

from data_prep.boxes import Box
from data_prep.record import NEEDS, Record
from m3d.tasks.base import Phrases, Rendered, ask, by_description, description, norm_boxes, slot
from m3d.tasks.codecs import BoxCodec
from m3d.tasks.wordings import read_back


def _question(record: Record, say: Phrases) -> str:
    """Ask where something is, by its name or by its description."""
    if by_description(record):
        return ask(record, say, "rec.box3d.description", description=description(record))
    return ask(record, say, "rec.box3d", name=slot(record, "object"))


def _denial(record: Record, say: Phrases, wording: str) -> str:
    """Say that what was asked for is not there; a text of the record's own is taken first."""
    if record.target.text is not None:
        return record.target.text
    if by_description(record):
        return say(f"{wording}.description", "absent")
    if record.prompt.text is not None:
        raise ValueError(
            f"record {record.id}: prompt.text asks for something absent; give target.text, or a template with slots"
        )
    return say(wording, "absent", name=slot(record, "object"))


class Locate:
    """``rec.box3d``: a name or a description in the prompt, name and box in the answer.

    A record whose ``boxes`` are an empty tuple is answered by the plain statement that it is not there.
    """

    name = "rec.box3d"
    needs = NEEDS["rec.box3d"]

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask where something is; several boxes are all given, in their order."""
        prompt, boxes = _question(record, say), norm_boxes(record)
        if not boxes:
            return Rendered(prompt, _denial(record, say, self.name))
        by_name = record.prompt.text is None and not by_description(record)
        name = slot(record, "object") if by_name else boxes[0].name
        wording = self.name if by_name else f"{self.name}.description"
        return Rendered(prompt, say(wording, "answer", name=name, box=say.join([codec.encode(box) for box in boxes])))

    def parse(self, text: str, codec: BoxCodec) -> list[Box]:
        """Every box in the answer, with its name where one of our wordings was said."""
        boxes = codec.decode(text)
        said = read_back((self.name, f"{self.name}.description"), "answer", text) if boxes else None
        return [replace(box, name=said["name"]) for box in boxes] if said else boxes


class Describe:
    """``reg``: a box in the prompt, what is in it in the answer: its name, or its name and a description.

    Where ``boxes`` are an empty tuple there is nothing to point at: as in the paper the question is then where
    something is, and the answer that it is not there.
    """

    name = "reg"
    needs = NEEDS["reg"]

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask what the record's box holds; several boxes hold the same."""
        boxes = norm_boxes(record)
        if not boxes:
            return Rendered(_question(record, say), _denial(record, say, self.name))
        names = {box.name for box in boxes}
        if len(names) > 1:
            raise ValueError(f"record {record.id}: task reg asks of one structure, got {sorted(names)}; split it")
        wording = f"{self.name}.description" if by_description(record) else self.name
        prompt = ask(record, say, wording, box=say.join([codec.encode(box) for box in boxes]))
        return Rendered(prompt, record.target.text or self._answer(record, say, wording, names.pop()))

    @staticmethod
    def _answer(record: Record, say: Phrases, wording: str, name: str) -> str:
        if not name.strip():
            raise ValueError(f"record {record.id}: task reg needs the box's name, or target.text")
        if by_description(record) and record.prompt.text is None:
            return say(wording, "answer", name=name, description=description(record))
        return say("reg", "answer", name=name)

    def parse(self, text: str, codec: BoxCodec) -> str:
        """The name that one of our wordings says, else the whole answer."""
        said = read_back((self.name, f"{self.name}.description"), "answer", text)
        return said["name"] if said else text.strip()
