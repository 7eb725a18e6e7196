"""A language model of a local folder as one who can be asked: what `data_prep` may not load itself, given to it.

Greedy, one conversation at a time, in a thread of its own so that the job's progress is not held up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from data_prep.questions_from_reports import AskedTooMuch, Reply
from m3d.inference.load import pick_device

__all__ = ["LocalChat"]


class _Stop(StoppingCriteria):
    """Ends a generation that nobody waits for any more."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device)


class LocalChat:
    """An endpoint (`data_prep.questions_from_reports.Endpoint`) that is a folder with a chat model in safetensors."""

    kind = "local"

    def __init__(
        self, folder: str | Path, *, device: str = "auto", max_tokens: int = 1500, dtype: torch.dtype | None = None
    ) -> None:
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: no model folder (config.json, safetensors, tokenizer) is there")
        self.model, self.max_tokens, where = folder.resolve().name, max_tokens, pick_device(device)
        if dtype is None:
            dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True
            )
        except SafetensorError as error:
            raise ValueError(f"{folder}: the weights cannot be read ({error}); fetch them again") from None
        if self._tokenizer.chat_template is None:
            raise ValueError(f"{folder}: the tokenizer has no chat template; take the model's chat or instruct version")
        self._network, self._turn = network.to(where).eval(), asyncio.Lock()

    async def chat(self, messages: Sequence[Mapping[str, str]], *, seed: int) -> Reply:
        """Answer greedily; ``seed`` changes nothing.

        Raises:
            AskedTooMuch: The conversation and the answer do not fit into the model's context.
        """
        async with self._turn:
            stop = _Stop()
            try:
                return await asyncio.to_thread(self._generate, [dict(message) for message in messages], stop)
            except asyncio.CancelledError:
                stop.asked.set()
                raise

    async def close(self) -> None:
        """Nothing is open."""

    def _generate(self, messages: list[dict[str, str]], stop: _Stop) -> Reply:
        ids = self._encode(messages).to(self._network.device)
        asked, room = ids.shape[1], getattr(self._network.config, "max_position_embeddings", None)
        if room is not None and asked + self.max_tokens > room:
            raise AskedTooMuch(f"{asked} tokens and {self.max_tokens} for the answer exceed the context of {room}")
        pad = self._tokenizer.pad_token_id
        with torch.inference_mode():
            out = self._network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self._tokenizer.eos_token_id if pad is None else pad,
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        said = out[0, asked:]
        text: str = self._tokenizer.decode(said, skip_special_tokens=True)
        return Reply(text=text, prompt_tokens=asked, completion_tokens=len(said))

    def _encode(self, messages: list[dict[str, str]]) -> torch.Tensor:
        """The conversation as ids: ``(1, T)``; where the template knows no system role, it goes before the question."""
        try:
            return self._rendered(messages)
        except TemplateError:
            system, first, *rest = messages
            merged = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
            return self._rendered([merged, *rest])

    def _rendered(self, messages: list[dict[str, str]]) -> torch.Tensor:
        encoded = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids: torch.Tensor = encoded["input_ids"]
        return ids
