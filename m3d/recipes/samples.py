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
from data_prep.volume import Volume
from m3d.inference.overlay import Row, draw_rows, save_png
from m3d.inference.planes import Finding, Window, mid_planes
from m3d.models import M3DForConditionalGeneration, M3DProcessor
from m3d.tasks.naming import named_masks
from m3d.tasks.wordings import Phrases
from m3d.train.cases import TrainingCase
from m3d.train.drawing import DrawByPrompts

MOST_DRAWN, MAX_NEW_TOKENS = 4, 160


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
            pixels, labels = case.tensors()
            names = [name for name in case.image.names.values() if case.mask(labels, name).any()][:MOST_DRAWN]
            said, _ = self.answer(pixels, Phrases()("report", "prompt"))
            row: dict[str, Any] = {"step": step, "image_id": case.id, "report": said}
            drawn: dict[str, np.ndarray[Any, Any]] = {}
            if names and self.model.seg_head is not None:
                prompt = Phrases()("seg.sem", "prompt", names=Phrases().join([f"the {name}" for name in names]))
                row["drawing"], drawn = self.answer(pixels, prompt)
            rows.append(row | {"drawn_voxels": {name: int(mask.sum()) for name, mask in drawn.items()}})
            picture(case, drawn, row, folder)
        write_rows(rows, folder)

    @torch.no_grad()
    def answer(self, pixels: torch.Tensor, prompt: str) -> tuple[str, dict[str, np.ndarray[Any, Any]]]:
        """What the model says, and the masks of what it names: ``(D, H, W)`` bool each."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            return self._answer(pixels, prompt, device)

    def _answer(
        self, pixels: torch.Tensor, prompt: str, device: torch.device
    ) -> tuple[str, dict[str, np.ndarray[Any, Any]]]:
        model, tokenizer = self.model, self.processor.tokenizer
        shown = pixels[None, None].to(device)
        ids = tokenizer(self.processor.write(prompt), return_tensors="pt")["input_ids"].to(device)
        features = model.get_image_features(shown)
        whole: Any = model.generate(  # type: ignore[misc]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_encoder_outputs={"image": features},
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        silent = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        text = self.processor.batch_decode([[one for one in whole[0, ids.shape[1] :].tolist() if one not in silent]])[0]
        if model.seg_head is None or model.config.seg_token_id not in whole[0, ids.shape[1] :]:
            return text.strip(), {}
        out = model(input_ids=whole, mm_encoder_outputs={"image": features}, draw_masks=True, logits_to_keep=1)
        masks = (out.mask_logits[:, 0] > 0).cpu().numpy()
        names = [name or f"mask {number}" for number, name in enumerate(named_masks(text), start=1)]
        return text.strip(), dict(zip(names, masks, strict=False))


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
