"""m3d-tiny: a small model of the whole kind, trained end to end on head-and-neck CTs and phantoms.

``python -m m3d.recipes.tiny configs/tiny.yaml data.openkbp=PATH output=runs/tiny``; run it again to continue.
"""

import argparse
import hashlib
import itertools
import json
import logging
import platform
import random
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedTokenizerFast

from data_prep.atomic import atomic_path
from data_prep.prepare import Job
from data_prep.preprocess import Foreground, Preprocess, Window
from data_prep.store import Store
from m3d.config import load_config
from m3d.inference.load import pick_device
from m3d.models import M3DConfig, M3DForConditionalGeneration, M3DProcessor, M3DSegConfig, M3DVisionConfig
from m3d.models.processing import add_m3d_tokens
from m3d.tasks import TASKS, render
from m3d.tasks.codecs import Frac3
from m3d.train.augment import Augment
from m3d.train.batches import Batches, place
from m3d.train.cases import PreparedCase, openkbp, phantoms, prepare_all, stored
from m3d.train.loop import OptimConfig, fit
from m3d.train.objective import LossWeights, TalkAndDraw
from m3d.train.words import Read, WordBatches

log = logging.getLogger(__name__)

TAUGHT = ("report", "vqa", "rec", "reg", "seg")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which cases: a store of ``m3d data prepare``, or a folder of OpenKBP cases, and phantoms by seed."""

    store: str | None = None
    openkbp: str | None = None
    phantoms: int = 64
    absent: float = 0.1


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """The grid that the model sees: voxels, nominal mm, HU window, and the HU above which the body is."""

    grid: tuple[int, int, int] = (64, 64, 96)
    spacing: tuple[float, float, float] = (5.0, 4.2, 5.0)
    window: tuple[float, float] = (-200.0, 400.0)
    body_above: float = -400.0

    def build(self) -> Preprocess:
        """The `Preprocess` that goes into the checkpoint."""
        return Preprocess(
            grid=self.grid,
            spacing=self.spacing,
            orientation="SPL",
            intensity=Window(*self.window),
            crop=Foreground(above=self.body_above),
        )


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Widths, layers and heads of the parts."""

    vision_width: int = 192
    vision_layers: int = 6
    vision_heads: int = 6
    patch: tuple[int, int, int] = (8, 8, 8)
    language_width: int = 256
    language_layers: int = 4
    language_heads: int = 4
    vocabulary: int = 1024
    decoder_heads: int = 6
    detail_channels: int = 16
    detail_filters: int = 16


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Volumes a step, exchanges a volume, and how often each task is drawn."""

    volumes: int = 1
    exchanges: int = 8
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Everything the recipe can be told; every field has its place in ``configs/tiny.yaml``."""

    output: str = "runs/tiny"
    seed: int = 0
    device: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    model: ModelSizes = field(default_factory=ModelSizes)
    batches: BatchConfig = field(default_factory=BatchConfig)
    words: OptimConfig = field(default_factory=OptimConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    augment: Augment = field(default_factory=Augment)


def read_cases(config: TinyConfig, preprocess: Preprocess) -> list[PreparedCase]:
    """Every training case of the store, or prepared now; about a second each, once."""
    if config.data.store:
        store = Store(config.data.store)
        if store.preprocess != preprocess:
            raise ValueError(
                f"{config.data.store} was prepared differently; compare its preprocess.json with the config"
            )
        return list(tqdm(stored(config.data.store, "train"), desc="reading", unit="case"))
    job = Job(preprocess=preprocess, derive=TAUGHT, seed=config.seed)
    real = openkbp(Path(config.data.openkbp), "train") if config.data.openkbp else iter(())
    made = phantoms(range(config.data.phantoms), absent=config.data.absent)
    cases = prepare_all(itertools.chain(real, made), job)
    return list(tqdm(cases, desc="preparing", unit="case"))


def train_tokenizer(cases: Sequence[PreparedCase], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the recipe's own texts, digits apart, in LLaMA's layout (BOS first)."""
    rng, codec, texts = random.Random(0), Frac3(), []
    for case in cases:
        labels = torch.from_numpy(case.labels)
        for record in case.records:
            placed = place(record, case, labels)
            if placed is not None:
                said = render(TASKS, placed, codec=codec, rng=rng)
                texts.append(f"{said.prompt} {said.answer}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )


def build(
    config: TinyConfig, cases: Sequence[PreparedCase], preprocess: Preprocess
) -> tuple[M3DForConditionalGeneration, M3DProcessor]:
    """The model and its processor, from nothing."""
    tokenizer = train_tokenizer(cases, config.model.vocabulary)
    token_ids = add_m3d_tokens(tokenizer)
    sizes = config.model
    vision = M3DVisionConfig(
        image_size=list(config.preprocess.grid),
        patch_size=list(sizes.patch),
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        cls_token=True,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.language_width,
        intermediate_size=8 * sizes.language_width // 3,
        num_hidden_layers=sizes.language_layers,
        num_attention_heads=sizes.language_heads,
        num_key_value_heads=sizes.language_heads,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    seg = M3DSegConfig(
        decoder_heads=sizes.decoder_heads,
        decoder_mlp_dim=2 * sizes.vision_width,
        iou_hidden_size=sizes.vision_width,
        num_masks=1,
        coordinates="grid",
        upscale_norm="channel",
        mask_prompt=True,
        detail_channels=sizes.detail_channels,
        detail_filters=sizes.detail_filters,
        projector_dropout=0.0,
    )
    model = M3DForConditionalGeneration(M3DConfig(vision_config=vision, text_config=text, seg_config=seg, **token_ids))
    return model, M3DProcessor(tokenizer, preprocess, model.config.num_image_tokens)


def data_hash(cases: Sequence[PreparedCase]) -> str:
    """SHA-256 of every prepared image and label map, in order: what was trained on, to the voxel."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(case.array.tobytes())
        digest.update(case.labels.tobytes())
    return digest.hexdigest()


def code_version() -> str | None:
    """The commit of the checkout that this runs from, where it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def manifest(config: TinyConfig, cases: Sequence[PreparedCase], parameters: int, step: int) -> dict[str, Any]:
    """Where a checkpoint comes from."""
    packages = ("torch", "transformers", "monai", "numpy")
    return {
        "name": "m3d-tiny",
        "step": step,
        "parameters": parameters,
        "seed": config.seed,
        "commit": code_version(),
        "data": {
            "OpenKBP training patients": sum(case.image.dataset == "OpenKBP" for case in cases),
            "phantoms": sum("phantom" in case.image.dataset for case in cases),
            "sha256": data_hash(cases),
        },
        "packages": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "text_truth": "derived from masks and header by rule; no radiologist's report was used",
    }


def save(
    folder: Path, model: M3DForConditionalGeneration, processor: M3DProcessor, config: TinyConfig, facts: dict[str, Any]
) -> None:
    """Write a checkpoint that `m3d.load` reads: weights in half precision, tokenizer, preprocess, recipe, manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    processor.save_pretrained(folder)
    recipe = asdict(config)
    for name in ("store", "openkbp"):
        recipe["data"][name] = name if recipe["data"][name] else None  # no paths of the machine it ran on
    recipe["output"] = "runs/tiny"
    for name, text in (("manifest.json", json.dumps(facts, indent=1)), ("recipe.yaml", yaml.safe_dump(recipe))):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def learn_words(
    model: M3DForConditionalGeneration, batches: Batches, optim: OptimConfig, folder: Path, device: torch.device
) -> None:
    """First the words alone; a run that goes on finds them learned."""
    folder.mkdir(parents=True, exist_ok=True)
    words = WordBatches(
        cases=batches.cases,
        tokenizer=batches.processor.tokenizer,
        codec=batches.codec,
        weights=batches.weights,
        seed=batches.seed,
    )
    fit(Read(model), words, optim, folder, device=device, on_save=lambda step: None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare, build, train, save."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args(arguments)
    config = load_config(TinyConfig, given.config, given.overrides)
    # Gradients of voxels far outside a structure are denormal numbers, which cost a CPU four times the step. It must be
    # said before the first parallel work: the threads made then keep it.
    torch.set_flush_denormal(True)

    torch.manual_seed(config.seed)
    output, device, preprocess = Path(config.output), pick_device(config.device), config.preprocess.build()
    output.mkdir(parents=True, exist_ok=True)
    cases = read_cases(config, preprocess)
    model, processor = build(config, cases, preprocess)
    model.to(device)  # type: ignore[arg-type]
    batches = Batches(
        cases=cases,
        processor=processor,
        codec=Frac3(),
        weights=config.batches.weights,
        augment=config.augment,
        volumes=config.batches.volumes,
        exchanges=config.batches.exchanges,
        seed=config.seed,
    )
    log.info("%d cases, %.2f M parameters on %s", len(cases), sum(p.numel() for p in model.parameters()) / 1e6, device)
    facts = manifest(config, cases, sum(p.numel() for p in model.parameters()), 0)
    learn_words(model, batches, config.words, output / "words", device)
    objective = TalkAndDraw(model, config.loss)
    fit(
        objective,
        batches,
        config.optim,
        output,
        device=device,
        on_save=lambda step: save(output / "m3d-tiny", model, processor, config, facts | {"step": step}),
    )


if __name__ == "__main__":
    main()
