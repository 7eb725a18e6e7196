"""Where is it, and what is it: referring expression comprehension (a box for a name) and generation (the reverse)."""

from data_prep.boxes import Box
from data_prep.record import Record
from m3d.tasks.base import Phrases, Rendered
from m3d.tasks.codecs import BoxCodec


def _box(record: Record) -> Box | None:
    boxes = record.target.get("boxes", ())
    return boxes[0] if boxes else None


class Locate:
    """``rec.box3d``: a name in the prompt, its box in the answer, or the plain statement that it is not there."""

    name = "rec.box3d"

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask where ``object`` is; a record without boxes says that it is absent."""
        name, box = str(record.slots["object"]), _box(record)
        prompt = say(self.name, "prompt", name=name)
        if box is None:
            return Rendered(prompt, say("absent", "answer", name=name))
        return Rendered(prompt, say(self.name, "answer", name=name, box=codec.encode(box)))

    def parse(self, text: str, codec: BoxCodec) -> list[Box]:
        """Every box in the answer."""
        return codec.decode(text)


class Describe:
    """``reg``: a box in the prompt, what is in it in the answer."""

    name = "reg"

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask what the record's box holds."""
        box = _box(record)
        if box is None:
            raise ValueError(f"record {record.id}: task reg needs a box")
        return Rendered(say(self.name, "prompt", box=codec.encode(box)), say(self.name, "answer", name=box.name))

    def parse(self, text: str, codec: BoxCodec) -> str:
        """The description itself."""
        return text.strip()
