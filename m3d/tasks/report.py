"""Texts about a whole scan: its report, and the caption by which it is found again."""

from data_prep.record import NEEDS, Record
from m3d.tasks.base import Phrases, Rendered, ask
from m3d.tasks.codecs import BoxCodec


class Report:
    """``report``: the target is the report's text."""

    name = "report"
    needs = NEEDS["report"]

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """Ask for the report; the answer is the target's text."""
        return Rendered(ask(record, say, self.name, modality=record.media[0].modality), str(record.target.text))

    def parse(self, text: str, codec: BoxCodec) -> str:
        """The report itself."""
        return text.strip()


class Retrieval:
    """``retrieval``: an image and its caption. Nothing is asked, so the prompt is empty and the answer is the caption.

    The contrastive pair is trained on ``answer``; evaluation ranks captions for images and images for captions.
    """

    name = "retrieval"
    needs = NEEDS["retrieval"]

    def render(self, record: Record, say: Phrases, codec: BoxCodec) -> Rendered:
        """The caption alone."""
        return Rendered(record.prompt.text or "", str(record.target.text))

    def parse(self, text: str, codec: BoxCodec) -> str:
        """The caption itself."""
        return text.strip()
