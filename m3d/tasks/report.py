"""Report generation: a scan in, its report out."""

from data_prep.record import Record
from m3d.tasks.base import Phrases, Rendered
from m3d.tasks.codecs import BoxCodec


class Report:
    """``report``: the target is the report's text."""

    name = "report"

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask for the report; the answer is the target's text."""
        return Rendered(say(self.name, "prompt"), str(record.target["text"]))

    def parse(self, text: str, codec: BoxCodec) -> str:
        """The report itself."""
        return text.strip()
