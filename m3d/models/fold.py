"""From a model in training to weights that anyone can load: LoRA and learned rows go back into the plain tensors.

All of it is arithmetic on named tensors that are whole and on the CPU, and refuses those that are not: under ZeRO-3 a
process by itself holds nothing but shards, and the reference's merge wrote tensors of size 0.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from m3d.models.token_rows import LEARNED, TABLE

State = dict[str, Tensor]

BASE, LORA_A, LORA_B = "base_layer.", "lora_A.default.weight", "lora_B.default.weight"


def whole_state(model: nn.Module) -> State:
    """Copies of a model's tensors by name, on the CPU, each shared one under one name only.

    Where an engine keeps pieces, call it within `m3d.train.engines.whole_weights`.
    """
    copies: State = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        copies[name] = tensor.detach().cpu().clone()
    return copies


def plain(state: Mapping[str, Tensor], *, scaling: float, rows: Tensor | None) -> State:
    """Names and values of the model without LoRA layers and learned rows.

    ``scaling`` is alpha / rank; ``rows`` are the ids of the learned rows, in their order.

    Raises:
        ValueError: A tensor is empty or has no counterpart: the state is not whole.
    """
    folded: State = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            raise ValueError(f"{name} is empty: this is a shard of a model, gather it before it is saved")
        if name.endswith((LORA_A, LORA_B, "." + LEARNED)):
            continue
        if name.endswith("." + TABLE):
            owner = name.removesuffix(TABLE)
            folded[owner + "weight"] = _with_rows(tensor, state[owner + LEARNED], rows)
        elif BASE in name:
            folded[name.replace(BASE, "")] = _with_lora(name, tensor, state, scaling)
        else:
            folded[name] = tensor
    return folded


def _with_rows(table: Tensor, learned: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None or len(rows) != len(learned):
        raise ValueError(f"{len(learned)} learned rows, but {0 if rows is None else len(rows)} ids to put them at")
    folded = table.clone()
    folded[rows.cpu()] = learned.to(table.dtype)
    return folded


def _with_lora(name: str, base: Tensor, state: Mapping[str, Tensor], scaling: float) -> Tensor:
    """``W + scaling B A``, computed in float32."""
    if not name.endswith(BASE + "weight"):
        return base
    owner = name.removesuffix(BASE + "weight")
    down, up = state[owner + LORA_A].float(), state[owner + LORA_B].float()
    return (base.float() + scaling * (up @ down)).to(base.dtype)
