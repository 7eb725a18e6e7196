"""What a stage's model will look like, from configs alone: of folders that are there, of stages that will make them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedConfig

from m3d.config import config_root, load_config
from m3d.models import M3DConfig, M3DSegConfig, M3DVisionConfig
from m3d.models.processing import TokenIds
from m3d.models.segvol import M3DSegVolConfig
from m3d.recipes.build import Init, VisionSizes, projector_settings
from m3d.recipes.pretrain_words import LanguageSizes
from m3d.recipes.registry import STAGES, read_values, recipe, sizes_alone, stage_of
from m3d.recipes.take_words import PACKAGES
from m3d.train.text_towers import MINILM_MODULE, TextTowerConfig, minilm_folder

PUBLISHED_GRID = (32, 256, 256)
NEW_TOKENS = 4
WHOLE = ("align", "instruct", "merge")  # stages that leave a whole model


@dataclass(frozen=True)
class Outline:
    """Looks into folders, and for those that are not there into configs ``beside``, whose outputs they are.

    ``grid`` is that of the stores; ``earlier`` are stages before this one, by their outputs. ``notes`` collects what
    else is to be known, ``made`` what is not there yet and what makes it.
    """

    beside: Path
    grid: tuple[int, int, int] = PUBLISHED_GRID
    notes: list[str] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)
    earlier: Mapping[Path, Any] = field(default_factory=dict)

    def remarks(self) -> tuple[str, ...]:
        """Everything that was noticed."""
        if not self.made:
            return tuple(self.notes)
        makers = ", ".join(f"{output} ({name})" for output, name in self.made.items())
        return (*self.notes, f"not there yet, sizes taken from what makes them: {makers}")

    def whole(self, init: Init) -> M3DConfig:
        """The whole model.

        Raises:
            FileNotFoundError: A folder is not there and no config makes it.
        """
        if init.checkpoint is not None:
            folder = _folder(init.checkpoint)
            if folder is not None:
                return M3DConfig.from_pretrained(folder)
            made = self._maker(init.checkpoint, "init.checkpoint")
            return self.whole(Init(checkpoint=made.checkpoint) if made.stage == "merge" else made.init)
        assert init.language_model is not None
        text = self.language_model(init.language_model)
        vision = self.vision(init)
        return M3DConfig(
            vision_config=vision,
            text_config=text,
            seg_config=self.head(init, vision),
            pool_size=init.pool,
            pooling=init.pooling,
            box_head=init.box_head,
            **projector_settings(init),
            **_taught(text, init.language_model),
        )

    def language_model(self, name: str, where: str = "init.language_model") -> PreTrainedConfig:
        """The config of a language model: of its folder, of the stage that will make it, or of shipped sizes."""
        folder = _folder(name)
        if folder is None and (folder := sizes_alone(name)) is not None:
            self.notes.append(f"{name} has sizes alone; to train, give the folder of the weights: {where}=PATH")
        if folder is not None:
            found: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
            return found
        made = self._maker(name, where)
        if made.stage == "take_words":
            taken: PreTrainedConfig = AutoConfig.from_pretrained(
                config_root() / PACKAGES[made.name].sizes, local_files_only=True
            )
            return taken
        if made.stage != "pretrain_words":
            raise ValueError(f"{where}={name} will be made by stage {made.stage}, which makes no language model")
        return words_config(made.model)

    def vision(self, init: Init) -> M3DVisionConfig:
        """The vision tower of the whole model."""
        if init.segvol is not None and init.vision_tower is None:
            head = self.segvol(init.segvol)
            if head.seg.encoder is None:
                return head.vision
        return self.tower(init.vision_tower, init.vision, "init.vision_tower")

    def tower(self, folder: str | None, sizes: VisionSizes | None, where: str = "init") -> M3DVisionConfig:
        """A vision tower from a folder, or from sizes."""
        if folder is not None:
            found = _folder(folder)
            if found is not None:
                return M3DVisionConfig.from_dict(
                    json.loads((found / "config.json").read_text(encoding="utf-8"))["vision_config"]
                )
            made = self._maker(folder, where)
            if made.stage in WHOLE:
                return self.whole(Init(checkpoint=folder)).vision
            sizes = made.vision
        return (sizes or VisionSizes()).config(self.grid)

    def text_tower(self, text: TextTowerConfig) -> PreTrainedConfig:
        """The config of a text tower."""
        here = importlib.util.find_spec(MINILM_MODULE) is not None
        source = ("minilm" if here else "small") if text.source == "auto" else text.source
        if source != "small":
            return self.language_model(str(minilm_folder()) if source == "minilm" else source, "text.source")
        return text.small.config(text.small.vocabulary, text.max_length)

    def head(self, init: Init, vision: M3DVisionConfig) -> M3DSegConfig | None:
        """The mask head, where there is one."""
        if init.segvol is not None:
            return self.segvol(init.segvol).seg
        return None if init.head is None else init.head.config(vision)

    def segvol(self, name: str) -> M3DSegVolConfig:
        """The head that pretrain_segvol makes, and the tower that it looks through."""
        folder = _folder(name)
        if folder is not None:
            return M3DSegVolConfig.of(folder)
        made = self._maker(name, "init.segvol")
        if made.stage in WHOLE:
            return M3DSegVolConfig.within(self.whole(Init(checkpoint=name)), name)
        return self.drawing(made)

    def drawing(self, config: Any) -> M3DSegVolConfig:  # noqa: ANN401 - pretrain_segvol's own
        """The model of pretrain_segvol."""
        if config.checkpoint is not None:
            here = _folder(config.checkpoint)
            return M3DSegVolConfig.of(here) if here else self.drawing(self._maker(config.checkpoint, "checkpoint"))
        vision = self.tower(config.vision_tower, config.vision, "vision_tower")
        seg, names = config.head.config(vision), config.names
        if names.language_model is not None:
            width = self.language_model(names.language_model, "names.language_model").hidden_size
            return M3DSegVolConfig(vision_config=vision, seg_config=seg, text_width=width, text_source="language")
        found = _folder(names.clip)
        if found is not None:
            width = json.loads((found / "config.json").read_text(encoding="utf-8"))["shared_width"]
        else:
            width = self._maker(names.clip, "names.clip").shared_width
        return M3DSegVolConfig(vision_config=vision, seg_config=seg, text_width=width, text_source="clip")

    @cached_property
    def outputs(self) -> dict[Path, Path]:
        """What the configs beside make, and those in folders beside: output -> config."""
        found: dict[Path, Path] = {}
        for path in [*sorted(self.beside.glob("*.yaml")), *sorted(self.beside.parent.glob("*/*.yaml"))]:
            values = read_values(path)
            if values.get("stage") in STAGES and values.get("stage") != "chain" and "output" in values:
                found.setdefault(Path(values["output"]), path)
        return found

    def _maker(self, folder: str, where: str) -> Any:  # noqa: ANN401 - any recipe's
        """The config whose output a folder will be."""
        stage = self.earlier.get(Path(folder)) or self.earlier.get(Path(folder).parent)
        if stage is not None:
            self.made[folder] = f"stage {stage.stage}"
            return stage
        path = self.outputs.get(Path(folder)) or self.outputs.get(Path(folder).parent)
        if path is None:
            raise FileNotFoundError(
                f"{where}={folder}: no such folder, and no config in {self.beside} makes it; "
                f"shipped sizes: {_architectures()}"
            )
        self.made[folder] = path.name
        return load_config(recipe(stage_of(path)).Config, path)


def words_config(sizes: LanguageSizes) -> LlamaConfig:
    """The language model that pretrain_words makes."""
    config = sizes.config(sizes.vocabulary + NEW_TOKENS)
    config.tokenizer_length = sizes.vocabulary
    return config


def _folder(name: str) -> Path | None:
    """The checkpoint folder that a name means, if it is there."""
    return next((one for one in (Path(name), Path(name) / "model") if (one / "config.json").is_file()), None)


def _taught(text: PreTrainedConfig, folder: str) -> TokenIds:
    """Ids of our tokens after the tokenizer's own, and rows for them where the table has none left."""
    first = _tokenizer_length(text, folder)
    text.vocab_size = max(text.vocab_size, first + NEW_TOKENS)
    image, begin, end, seg = range(first, first + NEW_TOKENS)
    return TokenIds(image_token_id=image, box_start_token_id=begin, box_end_token_id=end, seg_token_id=seg)


def _tokenizer_length(text: PreTrainedConfig, folder: str) -> int:
    if any(Path(folder).glob("tokenizer*")):
        return len(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    return int(getattr(text, "tokenizer_length", text.vocab_size))


def _architectures() -> str:
    """Those among the shipped configs."""
    root = config_root()
    return ", ".join(str(one.parent.relative_to(root)) for one in sorted(root.glob("language_models/*/config.json")))
