"""Several exchanges about one volume in one row, which shows the volume once.

::

    [BOS] <im_patch> x K | exchange 1 | exchange 2 | ...        one row
      segment 0              1             2                    who may see whom: 0, and one's own, and nothing later
      0 1 2 ... K            K+1 ...       K+1 ...              positions go on from the prefix, in each exchange anew

An exchange sees what it would see standing alone, at the positions it would have, so losses and gradients are those of
the unpacked rows, for one prefix instead of many (DESIGN 6).
"""

# B = rows, T = tokens of the longest row, K = placeholders of a volume

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m3d.models.processing import IGNORED
from m3d.train.exchanges import Exchange

PADDING = -1  # the segment of positions that are nobody's


@dataclass(frozen=True)
class Row:
    """Tokens of one row; ``segments`` are 0 in the prefix, 1, 2, ... in the exchanges, which are ``exchanges``."""

    ids: list[int]
    labels: list[int]
    positions: list[int]
    segments: list[int]
    exchanges: tuple[Exchange, ...]

    def __len__(self) -> int:
        return len(self.ids)


def prefix_length(ids: Sequence[int], image_token_id: int) -> int:
    """How many tokens there are up to and with the last placeholder."""
    return next((place for place in range(len(ids), 0, -1) if ids[place - 1] == image_token_id), 0)


def pack(exchanges: Sequence[Exchange], image_token_id: int) -> list[Row]:
    """Exchanges about one volume in as few rows as they can stand in.

    They share a row if they are alike up to the last placeholder. An exchange that says something before its volume, or
    whose first word after it is already learned (a caption that nobody asked for), has a row of its own: there, that
    word is predicted by the volume, in a pack it would be by the exchange before.
    """
    together: dict[tuple[int, ...], list[Exchange]] = {}
    for number, exchange in enumerate(exchanges):
        length = prefix_length(exchange.ids, image_token_id)
        alone = length == 0 or length == len(exchange.ids) or exchange.labels[length] != IGNORED
        key = (-1 - number,) if alone else tuple(exchange.ids[:length])
        together.setdefault(key, []).append(exchange)
    return [_row(some, image_token_id) for some in together.values()]


def unpacked(exchanges: Sequence[Exchange], image_token_id: int) -> list[Row]:
    """A row for every exchange."""
    return [_row([exchange], image_token_id) for exchange in exchanges]


def _row(exchanges: Sequence[Exchange], image_token_id: int) -> Row:
    start = prefix_length(exchanges[0].ids, image_token_id)
    row = Row(
        list(exchanges[0].ids[:start]), [IGNORED] * start, list(range(start)), [0] * start, exchanges=tuple(exchanges)
    )
    for number, exchange in enumerate(exchanges, start=1):
        own = len(exchange.ids) - start
        row.ids.extend(exchange.ids[start:])
        row.labels.extend(exchange.labels[start:])
        row.positions.extend(range(start, start + own))
        row.segments.extend([number] * own)
    return row


def prefix_row(ids: Sequence[int]) -> Row:
    """A row that shows its volume and says nothing of it."""
    return Row(list(ids), [IGNORED] * len(ids), list(range(len(ids))), [0] * len(ids), ())


def block_mask(segments: Tensor) -> Tensor:
    """Who may attend to whom, ``(B, T) -> (B, 1, T, T)`` bool: the prefix and one's own segment, up to oneself.

    Padding sees itself, so that no row of the softmax is empty.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    order = torch.arange(segments.shape[1], device=segments.device)
    earlier = order[None, :, None] >= order[None, None, :]
    seen = earlier & ((key == query) | (key == 0)) & (query != PADDING)
    return (seen | torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device))[:, None]


def stack(rows: Sequence[Row], pad_token_id: int, multiple: int = 8) -> dict[str, Tensor]:
    """Rows as the model takes them, padded on the right to the longest, rounded up to a multiple.

    ``attention_mask`` is (B, 1, T, T) where a row holds several exchanges, else the plain (B, T), which is faster.
    """
    length = -(-max(map(len, rows)) // multiple) * multiple
    segments = _padded([row.segments for row in rows], PADDING, length)
    several = any(len(row.exchanges) > 1 for row in rows)
    return {
        "input_ids": _padded([row.ids for row in rows], pad_token_id, length),
        "attention_mask": block_mask(segments) if several else (segments != PADDING).long(),
        "position_ids": _padded([row.positions for row in rows], 0, length),
        "labels": _padded([row.labels for row in rows], IGNORED, length),
    }


def _padded(rows: Sequence[Sequence[int]], value: int, length: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)


def values_of(rows: Sequence[Row]) -> list[tuple[int, int, float]]:
    """Where each measured answer begins, and what was measured: row, place of the token before it, value."""
    found = []
    for number, row in enumerate(rows):
        for segment, exchange in enumerate(row.exchanges, start=1):
            if exchange.value is not None:
                own = (place for place, one in enumerate(row.segments) if one == segment)
                first = next(place for place in own if row.labels[place] != IGNORED)
                found.append((number, first - 1, exchange.value))
    return found


def exchanges_of(rows: Sequence[Row]) -> Iterator[Exchange]:
    """All exchanges in reading order, which is that of the ``[SEG]`` and their masks."""
    for row in rows:
        yield from row.exchanges
