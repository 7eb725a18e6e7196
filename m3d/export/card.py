"""A model card that says what the checkpoint's own files say; nothing is claimed that was not written or measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoConfig

from data_prep.preprocess import Preprocess
from m3d.models import M3DConfig
from m3d.recipes.checkpoints import fingerprint, others_weights, read_manifest

TAGS = ("medical", "ct", "3d", "vision-language", "segmentation", "m3d-lamed")
TASK, LICENCE = "image-text-to-text", "apache-2.0"
OTHERS = "Its weights go back to {names}, whose authors' licence holds for them; name it here."
NAMES = {  # rows of benchmarks/tiny_accuracy.py that a card shows, and what they are called there
    "dice/mean": ("Dice by name, all structures", "dice"),
    "iou/mean": ("box IoU, all structures", "iou"),
    "vqa/mean": ("closed questions, accuracy", "accuracy"),
    "open/mean": ("open questions, exact answers", "exact_match"),
}


def model_card(source: Path, *, repo: str | None = None, metrics: Path | None = None) -> str:
    """README.md of a checkpoint folder: metadata for the hub, then what it is, learned from, scored, and is not for.

    ``metrics`` is a result of ``benchmarks/tiny_accuracy.py``.

    Raises:
        ValueError: ``metrics`` is another model's.
    """
    found = read_manifest(source)
    manifest = found or {}
    measured = {} if metrics is None else read_metrics(metrics, source)
    name = str(manifest.get("name") or source.name)
    others = others_weights(found, name)
    head = ModelCardData(
        language=["en"],
        license="other" if others else LICENCE,
        library_name="m3d-lamed",
        pipeline_tag=TASK,
        tags=list(TAGS),
        model_name=name,
        metrics=sorted({NAMES[row][1] for row in measured}) or None,
        eval_results=[_result(row, values) for row, values in measured.items()] or None,
    )
    sections = [
        f"# {name}",
        "**Not for clinical use.** For research: it may draw, measure and say what is not so.",
        _what(source, manifest),
        OTHERS.format(names=", ".join(f"`{other}`" for other in others)) if others else None,
        _use(repo),
        _learned(manifest),
        _scores(measured, manifest),
        LIMITS,
        _made(manifest),
    ]
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(part for part in sections if part) + "\n"


def read_metrics(path: Path, source: Path) -> dict[str, Mapping[str, Any]]:
    """The rows of a result that a card shows.

    Raises:
        ValueError: It is no such result, or was measured on another model.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found.get("metrics"), dict) or "fingerprint" not in found:
        raise ValueError(f"{path} is no result of benchmarks/tiny_accuracy.py: it has no metrics or no fingerprint")
    if found["fingerprint"] != fingerprint(source):
        raise ValueError(f"{path} was measured on another model than {source.name}: its fingerprint differs")
    return {row: found["metrics"][row] for row in NAMES if found["metrics"].get(row, {}).get("value") is not None}


def _what(source: Path, manifest: Mapping[str, Any]) -> str:
    config: Any = AutoConfig.from_pretrained(source, local_files_only=True)
    vision, seg, preprocess = config.vision, config.seg, Preprocess.read(source)
    text = config.text if isinstance(config, M3DConfig) else None  # a mask head alone does not speak
    kind = type(config).__name__ if text is None else "M3DForConditionalGeneration"
    parameters = manifest.get("parameters")
    rows = {
        "architecture": kind + (f", {parameters:,} parameters" if parameters else ""),
        "sees": f"3D ViT, {vision.num_hidden_layers} layers x {vision.hidden_size}, patches {_by(vision.patch_size)}",
        "speaks": "not at all",
        "draws": "no masks" if seg is None else "a mask for each [SEG], and for points, boxes and earlier masks",
        "input": f"one scan on a grid of {_by(preprocess.grid)}"
        + (f" at {_by(preprocess.spacing)} mm" if preprocess.spacing else "")
        + ", prepared as `preprocess.json` says",
    }
    if text is not None:
        rows["speaks"] = f"{text.model_type}, {text.num_hidden_layers} layers x {text.hidden_size}"
    elif seg is not None:
        rows["draws"] = "a mask for points, boxes and earlier masks"
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _use(repo: str | None) -> str:
    where, first = '"THIS_FOLDER"', ""
    if repo is not None:
        where, first = f'snapshot_download("{repo}")', "from huggingface_hub import snapshot_download\n\n"
    return f"""## Use

After `pip install m3d-lamed`:

```python
{first}import m3d

model = m3d.load({where})
scan = model.look("ct.nii.gz")
print(scan.report().text)
```"""


def _learned(manifest: Mapping[str, Any]) -> str:
    stores = manifest.get("learned_from") or manifest.get("data") or []
    rows = [
        f"- {', '.join(one.get('datasets') or [one['store']])}: {one['images']} scans, {one['records']} records"
        for one in stores
    ]
    said = manifest.get("notes") or {}
    notes = (
        [f"- {key}: {value}" for key, value in said.items()]
        if isinstance(said, Mapping)
        else [f"- {one}" for one in said]
    )
    if not rows:
        return "## Learned from\n\nIts manifest does not say."
    return "\n".join(["## Learned from", "", *rows, *notes])


def _scores(measured: Mapping[str, Mapping[str, Any]], manifest: Mapping[str, Any]) -> str:
    if measured:
        rows = [
            f"| {NAMES[row][0]} | {one['n']} | {_number(one)} | {_number(one, 'blind')} |"
            for row, one in measured.items()
        ]
        head = ["| | n | value (95 % interval) | the same with every voxel zero |", "|---|---|---|---|"]
        return "\n".join(["## Scores", "", *head, *rows])
    losses = {name: value for name, value in (manifest.get("metrics") or {}).items() if name.startswith("eval_")}
    if not losses:
        return "## Scores\n\nNone were measured."
    rows = [f"| {name} | {value:.4f} |" for name, value in losses.items()]
    return "\n".join(["## Scores", "", "Losses of its last evaluation; nothing else was measured.", "",
                      "| | |", "|---|---|", *rows])  # fmt: skip


def _made(manifest: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in (manifest.get("packages") or {}).items())
    parts = [
        f"stage `{manifest['stage']}`" if manifest.get("stage") else "",
        f"commit `{manifest['commit']}`" if manifest.get("commit") else "",
        packages,
    ]
    return "## Made with\n\n" + "; ".join(part for part in parts if part) if any(parts) else ""


LIMITS = """## What it is not for

Diagnosis, treatment, triage, or any decision about a patient. It knows what it was taught (above) and answers about
other things all the same; a structure that it does not know may be drawn somewhere, and one that is absent may be
described. Scans from other scanners, of other regions or in other units are not what it has seen."""


def _result(row: str, values: Mapping[str, Any]) -> EvalResult:
    title, kind = NAMES[row]
    return EvalResult(
        task_type=TASK,
        dataset_type="openkbp",
        dataset_name="OpenKBP, validation patients",
        metric_type=kind,
        metric_name=title,
        metric_value=round(float(values["value"]), 4),
    )


def _number(row: Mapping[str, Any], of: str = "") -> str:
    value = row.get(of or "value")
    if value is None:
        return "-"
    low, high = (row.get(f"{of}_{side}" if of else side) for side in ("low", "high"))
    return f"{value:.2f}" + ("" if low is None or high is None else f" ({low:.2f} to {high:.2f})")


def _by(sides: list[Any] | tuple[Any, ...] | None) -> str:
    return " x ".join(f"{side:g}" for side in sides or ())
