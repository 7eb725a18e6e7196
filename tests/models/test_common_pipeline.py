"""The processor and the pipeline, called as those of other models are."""

import numpy as np
import pytest
import torch
from transformers import pipeline

from data_prep.volume import BadScan
from data_prep.write import write_volume
from m3d.inference.checkpoints import resolve
from m3d.models import VolumeTextToTextPipeline
from m3d.models.processing import plain_words
from tests.fixtures.small_scan import GRID, small_scan

WORDS = {"max_new_tokens": 4}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "scan.nii.gz"
    write_volume(path, small_scan(0))
    return path


def test_a_file_is_what_is_in_it(processor, file):
    one, other = processor(str(file), "Hi"), processor(images=small_scan(0), text="Hi")
    assert one["pixel_values"].shape == (1, 1, *GRID)
    torch.testing.assert_close(one["pixel_values"], other["pixel_values"])
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert set(processor(text=["Hi", "Hello"])) == {"input_ids", "attention_mask"}
    assert set(processor(file)) == {"pixel_values"}


def test_scans_are_shared_among_texts(processor):
    image = processor.tokenizer.convert_tokens_to_ids("<im_patch>")
    scans = [small_scan(seed) for seed in range(3)]
    for images, texts, shown in (
        (scans, "Compare.", [3]),
        ([scans[:2], scans[2:]], ["Compare.", "What?"], [2, 1]),
        ([scans[0], scans[1:]], ["What?", "Compare."], [1, 2]),
        ([scans[:2], []], ["Compare.", "No scan?"], [2, 0]),
    ):
        batch = processor(images, texts)
        assert (batch["input_ids"] == image).sum(dim=1).tolist() == [one * processor.num_image_tokens for one in shown]
        assert len(batch["pixel_values"]) == sum(shown)
    with pytest.raises(ValueError, match="3 scans for 2 texts; give each text its scan, or a list of scans"):
        processor(scans, ["One?", "Two?"])


def test_what_is_no_scan_is_refused(processor, tmp_path):
    with pytest.raises(TypeError, match=r"not ndarray; an array has no place in the patient: give m3d.Volume\(array"):
        processor(np.zeros(GRID, np.float32)[None], "Hi")
    with pytest.raises(TypeError, match="unexpected keyword argument 'volume'"):
        processor(volume=small_scan(), text="Hi")
    with pytest.raises(ValueError, match="return_tensors='np': the model takes tensors of torch"):
        processor(small_scan(), "Hi", return_tensors="np")
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"none")
    with pytest.raises(BadScan, match="broken"):
        processor(broken, "Hi")


def test_boxes_and_masks_stay_in_the_words(processor):
    text = "Here <bx_start>[0.100]<bx_end> is the liver [SEG]."
    ids = processor.tokenizer(processor.write(text), return_tensors="pt")["input_ids"]
    ids = torch.cat([ids, torch.tensor([[2, 0, 0]])], dim=1)
    assert processor.post_process_image_text_to_text(ids) == [text]
    assert plain_words(processor.tokenizer, ids[0, 1 + processor.num_image_tokens :].tolist()) == text
    raw = processor.post_process_image_text_to_text(ids, skip_special_tokens=False)[0]
    assert raw.startswith("<s><im_patch>") and raw.endswith("</s><pad><pad>")


@pytest.fixture
def pipe(model, processor):
    return pipeline("volume-text-to-text", model=model, processor=processor)


def test_it_says_what_generate_says(pipe, model, processor, file):
    assert isinstance(pipe, VolumeTextToTextPipeline)
    asked = processor(file, "What?")
    with torch.no_grad():
        ids = model.generate(**asked, **WORDS)[0]
    answer = plain_words(processor.tokenizer, ids[asked["input_ids"].shape[1] :].tolist())
    for scan in (str(file), file, small_scan(0)):
        (said,) = pipe(images=scan, text="What?", return_full_text=False, **WORDS)
        assert said["input_text"] == "What?" and said["generated_text"].strip() == answer
    (whole,) = pipe({"images": small_scan(0), "text": "What?"}, **WORDS)
    assert whole["generated_text"] == "What?" + said["generated_text"]
    (raw,) = pipe(images=file, text="What?", return_tensors=True, **WORDS)
    assert raw["generated_token_ids"].tolist() == ids.tolist()


def test_several_scans_at_once(pipe):
    scans, texts = [small_scan(0), small_scan(1)], ["What?", "Where is it?"]
    together = pipe(images=scans, text=texts, return_full_text=False, **WORDS)
    alone = [
        pipe(images=one, text=text, return_full_text=False, **WORDS)[0] for one, text in zip(scans, texts, strict=True)
    ]
    assert together == alone


def test_chats_are_refused(pipe):
    chat = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    with pytest.raises(ValueError, match="answers single questions, no chats"):
        pipe(text=chat, **WORDS)


def test_the_stock_pipeline_takes_no_scan(model, processor):
    """Why there is one of our own: Pillow opens every image of the stock one."""
    stock = pipeline("image-text-to-text", model=model, processor=processor)
    with pytest.raises(TypeError, match="Incorrect format used for image"):
        stock(images=small_scan(0), text="What?", **WORDS)


def test_the_bundled_model_by_its_folder(file):
    pipe = pipeline("volume-text-to-text", model=str(resolve("m3d-tiny")))
    (said,) = pipe(images=file, text="Where is the mandible?", max_new_tokens=40, return_full_text=False)
    assert isinstance(said["generated_text"], str) and "<im_patch>" not in said["generated_text"]
