"""The language model in 8 or 4 bits, through transformers and bitsandbytes.

Eyes, perceiver, mask head and box head are never quantised, whatever quantisation transformers is asked for:
`M3DPreTrainedModel` names them in ``_keep_in_fp32_modules``, and the output projection is left out by transformers.
"""

import importlib.util
from typing import Literal, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig

Quantize = Literal["4bit", "8bit"]
PACKED_ROWS = 32  # that bitsandbytes packs together on CPUs with avx512_bf16; it asserts that a layer has a multiple


def quantization(how: Quantize, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers is to load: ``8bit`` is LLM.int8(), ``4bit`` is NF4; computed in ``dtype``.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
        ValueError: There is no such quantisation.
    """
    if how not in get_args(Quantize):
        raise ValueError(f"quantize={how!r} is not one of {', '.join(get_args(Quantize))}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(f"quantize={how!r} needs 'bitsandbytes': pip install 'm3d-lamed[quantize]'")
    if how == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def refuse_odd_layers(model: nn.Module) -> None:
    """Stop here, rather than in the first answer, where bitsandbytes cannot run a 4-bit layer on this CPU.

    Raises:
        ValueError: A layer's size is no multiple of what is packed together.
    """
    for name, layer in model.named_modules():
        packs = getattr(layer, "support_avx512bf16_for_cpu", False) and getattr(layer, "out_features", 0)
        if packs and next(layer.parameters()).device.type == "cpu" and packs % PACKED_ROWS:
            raise ValueError(
                f"quantize='4bit' on this CPU needs layers of a multiple of {PACKED_ROWS}, and {name} has {packs}; "
                "use '8bit', or a GPU"
            )
