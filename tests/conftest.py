"""What all tests share: where real data may be found, and a model of a few thousand weights with every part."""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve whatever else runs; read by torch
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: so before anything that imports it
import m3d  # isort: skip  # puts the torchvision remedy in place before transformers is imported

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from data_prep.preprocess import Preprocess
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor, M3DSegConfig, M3DVisionConfig
from m3d.models.processing import add_m3d_tokens

torch.set_num_threads(2)
GRID = (8, 16, 24)


@pytest.fixture(autouse=True)
def denormals():
    """Training flushes them to zero for the whole process; other tests count on them."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public CTs beside the checkout; tests that want it skip where it is not."""
    assert m3d.__file__ is not None
    beside = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("M3D_SHARED", beside))
    if not (folder / "data").is_dir():
        pytest.skip("real CTs are not here: set M3D_SHARED to a folder that holds data/openkbp")
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {
        token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def small_config(tokenizer: PreTrainedTokenizerFast, ids: dict[str, int], **seg: object) -> M3DConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {
        "decoder_heads": 2,
        "decoder_mlp_dim": 32,
        "iou_hidden_size": 16,
        "num_masks": 1,
        "coordinates": "grid",
        "upscale_norm": "channel",
        "mask_prompt": True,
    } | seg
    return M3DConfig(
        vision_config=M3DVisionConfig(image_size=list(GRID), patch_size=[4, 8, 8], detail_channels=4, **sizes),
        text_config=LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes),
        seg_config=M3DSegConfig(**settings),
        pool_size=1,
        **ids,
    )


@pytest.fixture(scope="session")
def tokenizer_and_ids():
    tokenizer = byte_tokenizer()
    return tokenizer, add_m3d_tokens(tokenizer)


@pytest.fixture
def model(tokenizer_and_ids) -> M3DForConditionalGeneration:
    torch.manual_seed(0)
    return M3DForConditionalGeneration(small_config(*tokenizer_and_ids)).eval()


@pytest.fixture
def processor(tokenizer_and_ids, model) -> M3DProcessor:
    return M3DProcessor(tokenizer_and_ids[0], Preprocess(grid=GRID), model.config.num_image_tokens)
