"""Sample predictions while a model learns: what it writes about a few scans, and what it draws, beside what is true."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics.meandice import compute_dice

from data_prep.boxes import Box
from data_prep.store import unpack
from data_prep.volume import Volume, spl_affine
from m3d.inference.measuring import measured_on, plain_words, speak
from m3d.inference.overlay import Row, draw_rows, save_png
from m3d.inference.planes import Finding, Window, mid_planes
from m3d.models import M3DForConditionalGeneration, M3DProcessor
from m3d.tasks.evidence import Asking, value_words
from m3d.tasks.naming import named_masks
from m3d.tasks.wordings import Phrases
from m3d.train.cases import TrainingCase
from m3d.train.drawing import DrawByPrompts

MOST_DRAWN, MAX_NEW_TOKENS = 4, 512


@dataclass(frozen=True, eq=False)
class SampleSheet:
    """Writes, for each case, ``NAME.png``: the masks that the model draws and the words that it says; and a JSON."""

    model: M3DForConditionalGeneration
    processor: M3DProcessor
    cases: tuple[TrainingCase, ...]
    bf16: bool = False

    def __call__(self, step: int, folder: Path) -> None:
        """Look at every case: a report, and all its structures by name."""
        rows = []
        for case in self.cases:
            labels = case.tensors()[1]
            names = [name for name in case.image.names.values() if case.mask(labels, name).any()][:MOST_DRAWN]
            said, _ = self.answer(case, Phrases()("report", "prompt"))
            row: dict[str, Any] = {"step": step, "image_id": case.id, "report": said}
            drawn: dict[str, np.ndarray[Any, Any]] = {}
            if names and self.model.seg_head is not None:
                prompt = Phrases()("seg.sem", "prompt", names=Phrases().join([f"the {name}" for name in names]))
                row["drawing"], drawn = self.answer(case, prompt)
            rows.append(row | {"drawn_voxels": {name: int(mask.sum()) for name, mask in drawn.items()}})
            picture(case, drawn, row, folder)
        write_rows(rows, folder)

    @torch.no_grad()
    def answer(self, case: TrainingCase, prompt: str) -> tuple[str, dict[str, np.ndarray[Any, Any]]]:
        """What the model says, and the masks of what it names: ``(D, H, W)`` bool each."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            return self._answer(case, prompt, device)

    def _answer(
        self, case: TrainingCase, prompt: str, device: torch.device
    ) -> tuple[str, dict[str, np.ndarray[Any, Any]]]:
        model, tokenizer, pixels = self.model, self.processor.tokenizer, case.tensors()[0]
        ids = tokenizer(self.processor.write(prompt), return_tensors="pt")["input_ids"].to(device)
        features = model.get_image_features(pixels[None, None].to(device))

        def drawn(sequence: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
            said = sequence[0, ids.shape[1] :]
            if model.seg_head is None or model.config.seg_token_id not in said:
                return {}
            out = model(input_ids=sequence, mm_encoder_outputs={"image": features}, draw_masks=True, logits_to_keep=1)
            names = enumerate(named_masks(plain_words(tokenizer, said.tolist())), start=1)
            masks = (out.mask_logits[:, 0] > 0).cpu().numpy()
            return dict(zip([name or f"mask {number}" for number, name in names], masks, strict=False))

        def measured(_: int, wanted: Asking, sequence: torch.Tensor) -> str:
            volume, value = _placed(case, pixels), None
            if volume is not None:
                value = measured_on(volume, drawn(sequence[None]), wanted, unit="norm01")
            return value_words(wanted, value)

        (whole,) = speak(
            model, tokenizer, list(ids), measured=measured, max_new_tokens=MAX_NEW_TOKENS, features=features
        )
        return plain_words(tokenizer, whole[ids.shape[1] :].tolist()), drawn(whole[None])


def _placed(case: TrainingCase, pixels: torch.Tensor) -> Volume | None:
    """A case's picture with its spacing, to measure in; None where it does not lie as ours do."""
    if case.image.media.spacing_mm is None or case.image.media.orient != "SPL":
        return None
    return Volume(pixels.numpy(), spl_affine(case.spacing))


@dataclass(frozen=True, eq=False)
class DrawnSheet:
    """Writes, for each case, ``NAME.png``: the masks that the head draws by name; and a JSON with their Dice."""

    objective: DrawByPrompts
    cases: tuple[TrainingCase, ...]
    bf16: bool = False

    def __call__(self, step: int, folder: Path) -> None:
        """Look at every case, and draw its structures."""
        model, rows = self.objective.model, []
        device = next(model.parameters()).device
        for case in self.cases:
            pixels, labels = case.tensors()
            truth = {name: case.mask(labels, name).numpy() for name in case.image.names.values()}
            names = [name for name, mask in truth.items() if mask.any()][:MOST_DRAWN]
            if not names:
                continue
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                features = model.look(pixels[None, None].to(device))
                nowhere = torch.zeros(len(names), dtype=torch.long, device=device)
                logits = model.draw(features, nowhere, names=self.objective.names(names, 0))
            drawn = {name: mask > 0 for name, mask in zip(names, logits[:, 0].float().cpu().numpy(), strict=True)}
            answers, truths = (np.stack([masks[name] for name in names])[:, None] for masks in (drawn, truth))
            scores = compute_dice(torch.from_numpy(answers), torch.from_numpy(truths))[:, 0]
            dice = dict(zip(names, scores.tolist(), strict=True))
            said = ", ".join(f"{name} {value:.2f}" for name, value in dice.items())
            rows.append({"step": step, "image_id": case.id, "drawing": f"Dice: {said}", "dice": dice})
            picture(case, drawn, rows[-1], folder)
        write_rows(rows, folder)


def write_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write ``samples.json``."""
    (folder / "samples.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def picture(case: TrainingCase, drawn: dict[str, Any], row: dict[str, Any], folder: Path) -> None:
    """Draw masks over the middle planes of a case, and what was said of it below, into ``folder``."""
    volume = Volume(unpack(case.read()[0]), case.image.affine)
    findings = [Finding(name, mask) for name, mask in drawn.items() if mask.any()]
    planes = mid_planes(volume, findings, around=Box((0, 0, 0), volume.shape))
    words = [(label, row[label]) for label in ("report", "drawing") if row.get(label)]
    title = f"step {row['step']}   {case.id}"
    notes = ["What the model draws and says while it learns; not for clinical use."]
    save_png(
        draw_rows([Row(planes, Window(0.0, 1.0), smooth=False)], findings, title=title, notes=notes, words=words),
        folder / f"{case.id.replace('/', '-')}.png",
    )
