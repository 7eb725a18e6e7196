"""`pipeline("volume-text-to-text", model=folder)`: scans and words in, words out, as users of transformers know it.

The stock ``image-text-to-text`` pipeline opens every image with Pillow, so no scan passes through it; all else of it is
used here. Words are all that a pipeline gives: for boxes and masks on the scan's own grid there is `m3d.load`.
"""

from typing import Any

from transformers import AutoModelForImageTextToText, BatchFeature, ImageTextToTextPipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils.chat_template_utils import Chat

TASK = "volume-text-to-text"


class VolumeTextToTextPipeline(ImageTextToTextPipeline):
    """As its parent, but ``images`` are scans: paths, `Volume`, or a list of them for each text."""

    def preprocess(self, inputs: Any = None, **kwargs: Any) -> BatchFeature:  # type: ignore[override]  # noqa: ANN401
        """Scans and words as the model takes them.

        Raises:
            ValueError: A chat is given: the model has learned single questions.
        """
        if isinstance(inputs, Chat):
            raise ValueError("this model answers single questions, no chats; give images=... and text=...")
        given = inputs if isinstance(inputs, dict) else {"images": None, "text": inputs}
        options = kwargs.pop("processor_kwargs", None) or kwargs
        processor: Any = self.processor
        prepared: BatchFeature = processor(images=given["images"], text=given["text"], **options)
        prepared = prepared.to(dtype=self.dtype)
        prepared["text"] = given["text"]
        return prepared


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=VolumeTextToTextPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
)
