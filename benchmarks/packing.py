"""Exchanges a second of a training step (forward, backward, AdamW), by how the exchanges about a volume stand in rows.

    python benchmarks/packing.py [--rounds N] [--sizes tiny ...]

Three ways, in turn within each round, on the same items of our phantoms: ``apart``, every exchange with its volume,
which is encoded for each (as the released code trains); ``shared``, rows of their own, the volume encoded once
(``packing: off``); and ``packed``. Weights are random: speed does not depend on them. With a GPU also in the published
sizes (ViT-B on 32 x 256 x 256, LLaMA-2-7B with LoRA, bfloat16). Writes ``benchmarks/results/packing.json``.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import m3d  # noqa: F401  # isort: skip  # puts the torchvision remedy in place before transformers is imported
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from data_prep.atomic import atomic_path
from data_prep.phantoms import head_neck
from data_prep.prepare import Job
from data_prep.preprocess import Foreground, Preprocess, Window
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor, M3DSegConfig, M3DVisionConfig
from m3d.models.lora import Lora, inject_lora
from m3d.models.processing import BOX_END, BOX_START, IMAGE_TOKEN, SEG_TOKEN
from m3d.tasks.codecs import Frac3
from m3d.train.cases import prepare
from m3d.train.data import Collator, Exchanges, VolumeDataset
from m3d.train.objective import LossWeights, TalkAndDraw

HOME = Path(__file__).parents[1]
RESULT = HOME / "benchmarks" / "results" / "packing.json"
TOKENIZER = HOME / "m3d" / "bundled" / "m3d-tiny"
WEIGHTS = {"report": 1, "vqa.closed": 1.5, "vqa.open": 1, "rec.box3d": 2, "reg": 1, "seg.sem": 1}
WAYS = ("apart", "shared", "packed")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths and depths; ``lora`` freezes all of the language model but low-rank layers."""

    grid: tuple[int, int, int]
    patch: tuple[int, int, int]
    spacing: tuple[float, float, float]
    vision: tuple[int, int, int]
    language: tuple[int, int, int, int]
    decoder_heads: int
    detail: int = 0
    lora: bool = False


SIZES = {
    "tiny": Sizes(
        grid=(64, 64, 96), patch=(8, 8, 8), spacing=(5, 4.2, 5), vision=(192, 6, 6), language=(256, 4, 4, 683),
        decoder_heads=6, detail=16,
    ),
    "smol": Sizes(
        grid=(64, 64, 96), patch=(8, 8, 8), spacing=(5, 4.2, 5), vision=(192, 6, 6), language=(576, 30, 9, 1536),
        decoder_heads=6, detail=16,
    ),
    "published": Sizes(
        grid=(32, 256, 256), patch=(4, 16, 16), spacing=(10, 1.1, 2), vision=(768, 12, 12),
        language=(4096, 32, 32, 11008), decoder_heads=8, lora=True,
    ),
}  # fmt: skip


def build(sizes: Sizes, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> M3DForConditionalGeneration:
    """A model of these sizes with random weights."""
    width, layers, heads = sizes.vision
    vision = M3DVisionConfig(
        image_size=list(sizes.grid), patch_size=list(sizes.patch), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=heads, detail_channels=sizes.detail,
        detail_filters=max(sizes.detail, 8),
    )  # fmt: skip
    hidden, depth, language_heads, mlp = sizes.language
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=depth,
        num_attention_heads=language_heads, pad_token_id=0,
    )  # fmt: skip
    seg = M3DSegConfig(
        decoder_heads=sizes.decoder_heads, num_masks=1, coordinates="grid", upscale_norm="channel", mask_prompt=True,
        projector_dropout=0.0,
    )  # fmt: skip
    named = {"image": IMAGE_TOKEN, "box_start": BOX_START, "box_end": BOX_END, "seg": SEG_TOKEN}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    torch.manual_seed(0)
    with torch.device(device):
        model = M3DForConditionalGeneration(M3DConfig(vision_config=vision, text_config=text, seg_config=seg, **ids))
    if sizes.lora:
        model.language_model.to(torch.bfloat16).requires_grad_(False)
        inject_lora(model, ["language_model"], Lora())
    return model.to(device).train()


def batches(sizes: Sizes, tokenizer: PreTrainedTokenizerBase, images: int, exchanges: int) -> dict[str, list[Any]]:
    """The same items in the three ways."""
    preprocess = Preprocess(
        grid=sizes.grid, spacing=sizes.spacing, intensity=Window(-200, 400), crop=Foreground(above=-400.0),
        orientation="SPL",
    )  # fmt: skip
    job = Job(preprocess=preprocess, derive=("report", "vqa", "rec", "reg", "seg"))
    cases = [prepare(head_neck(seed), job) for seed in range(images)]
    patches = [side // patch for side, patch in zip(sizes.grid, sizes.patch, strict=True)]
    processor = M3DProcessor(tokenizer, preprocess, patches[0] * patches[1] * patches[2] // 8)
    view = Exchanges(processor=processor, codec=Frac3(), weights=WEIGHTS, exchanges=exchanges)
    items = list(VolumeDataset(cases, view))
    plain, packed = Collator(processor=processor, packing=False), Collator(processor=processor)
    shared = [plain([item]) for item in items]
    seg = int(tokenizer.convert_tokens_to_ids(SEG_TOKEN))
    apart = [encoded_each(batch, seg) for batch in shared]
    return {"apart": apart, "shared": shared, "packed": [packed([item]) for item in items]}


def encoded_each(batch: dict[str, Any], seg_token_id: int) -> dict[str, Any]:
    """Every row has a volume of its own, and so has every mask."""
    rows, image = len(batch["input_ids"]), batch["pixel_values"]
    return batch | {
        "pixel_values": image.expand(rows, *image.shape[1:]).contiguous(),
        "volume_index": torch.arange(rows),
        "mask_volume": (batch["input_ids"] == seg_token_id).nonzero()[:, 0],
    }


def step_of(model: M3DForConditionalGeneration, weights: LossWeights) -> Callable[[dict[str, Any]], float]:
    """A training step; returns its seconds."""
    device = model.device
    halves = device.type == "cuda" or any(p.dtype == torch.bfloat16 for p in model.parameters())
    objective = TalkAndDraw(model, weights)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def step(batch: dict[str, Any]) -> float:
        moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        wait()
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=halves):
            losses = objective(moved)
        torch.stack([x.weight * x.total / max(1, batch["counts"][x.count]) for x in losses.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - began

    return step


def measure(name: str, *, rounds: int, images: int, exchanges: int, device: torch.device) -> dict[str, Any]:
    """Exchanges a second of each way: words and masks, and words alone."""
    sizes, tokenizer = SIZES[name], AutoTokenizer.from_pretrained(TOKENIZER)
    ways = batches(sizes, tokenizer, images, exchanges)
    found: dict[str, Any] = {
        "grid": list(sizes.grid),
        "parameters": 0,
        "exchanges a volume": ways["packed"][0]["counts"]["exchanges"],
        "tokens a volume": {way: statistics.mean(batch["counts"]["tokens"] for batch in ways[way]) for way in WAYS},
    }
    for what, weights in {
        "words and masks": LossWeights(), "words alone": LossWeights(dice=0, bce=0, prompted=0)
    }.items():  # fmt: skip
        model = build(sizes, tokenizer, device)
        found["parameters"] = sum(p.numel() for p in model.parameters())
        step = step_of(model, weights)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in tqdm(range(-1, rounds), desc=f"{name}, {what}"):
            for way in WAYS:
                spent = step(ways[way][turn % images])
                if turn >= 0:  # the first round warms up
                    seconds[way].append(ways[way][turn % images]["counts"]["exchanges"] / spent)
        rate = {way: round(statistics.median(seconds[way]), 3) for way in WAYS}
        ratio = {f"packed / {way}": round(rate["packed"] / rate[way], 2) for way in WAYS[:2]}
        found[what] = {"exchanges a second": rate, **ratio}
        del model, step
        gc.collect()
    return found


def main() -> None:
    """Measure, say and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--exchanges", type=int, default=8)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: tiny, and published where there is a GPU")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    machine = (
        torch.cuda.get_device_name()
        if gpu
        else f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    names = given.sizes or (["tiny", "published"] if gpu else ["tiny"])
    run = {"rounds": given.rounds, "images": given.images, "exchanges": given.exchanges, "device": device}
    results = {"machine": machine, "torch": torch.__version__, "rounds": given.rounds, "sizes": {}}
    for name in names:
        results["sizes"][name] = measure(name, **run)
    with atomic_path(RESULT) as path:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, found in results["sizes"].items():
        print(
            f"\n{name}: {found['parameters'] / 1e6:.1f} M parameters, {found['exchanges a volume']} exchanges a volume"
        )
        for what in ("words and masks", "words alone"):
            print(f"  {what:16}", json.dumps(found[what]))
    print(f"kept in {RESULT.name}")


if __name__ == "__main__":
    main()
