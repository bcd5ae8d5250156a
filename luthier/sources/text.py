"""Texts as token ids, once; batches of them as tensors, quickly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from luthier.sources.data import Split

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Encoded:
    """The rows of a split as tokens, unpadded.

    Args:
        input_ids: an int32 array a row.
        type_ids: which of the two texts a token is of, an int32 array a row; None when the model has no such input.
        lengths: tokens a row, after truncation.
        truncated: rows that were cut.
        targets: shape (rows,), from ``Task.targets``; None to predict.
    """

    input_ids: tuple[Ids, ...]
    type_ids: tuple[Ids, ...] | None
    lengths: tuple[int, ...]
    truncated: int
    targets: npt.NDArray[Any] | None = None

    @cached_property
    def digest(self) -> str:
        """sha256 over tokens, types and targets."""
        told = hashlib.sha256(repr(self.lengths).encode())
        for rows in (self.input_ids, self.type_ids or ()):
            told.update(np.concatenate([*rows, np.array([-1], dtype=np.int32)]).tobytes())
        told.update(b"" if self.targets is None else self.targets.tobytes())
        return told.hexdigest()

    def __len__(self) -> int:
        return len(self.input_ids)

    def joined(self, other: Encoded) -> Encoded:
        """The rows of both, the other's last."""
        both = self.targets is not None and other.targets is not None
        return Encoded(
            self.input_ids + other.input_ids,
            None if self.type_ids is None or other.type_ids is None else self.type_ids + other.type_ids,
            self.lengths + other.lengths,
            self.truncated + other.truncated,
            np.concatenate([self.targets, other.targets]) if both else None,  # type: ignore[list-item]
        )

    def take(self, rows: Sequence[int]) -> Encoded:
        """The rows numbered ``rows``, in that order; ``truncated`` stays the whole split's."""
        return Encoded(
            tuple(self.input_ids[row] for row in rows),
            None if self.type_ids is None else tuple(self.type_ids[row] for row in rows),
            tuple(self.lengths[row] for row in rows),
            self.truncated,
            None if self.targets is None else self.targets[np.asarray(rows, dtype=np.int64)],
        )


def encode(tokenizer: Any, split: Split, targets: npt.NDArray[Any] | None = None, *, max_length: int) -> Encoded:
    """The rows of ``split`` as tokens, each row cut to ``max_length`` (the longer text of a pair first)."""
    typed = "token_type_ids" in tokenizer.model_input_names
    told = _tokens(tokenizer, split, max_length, return_token_type_ids=typed)
    ids = tuple(np.asarray(row, dtype=np.int32) for row in told["input_ids"])
    types = tuple(np.asarray(row, dtype=np.int32) for row in told["token_type_ids"]) if typed else None
    if told.encodings is not None:
        cut = sum(bool(row.overflowing) for row in told.encodings)
    else:
        cut = sum(n > max_length for n in lengths(tokenizer, split))
    return Encoded(ids, types, tuple(len(row) for row in ids), cut, targets)


def lengths(tokenizer: Any, split: Split) -> tuple[int, ...]:
    """Tokens of each row before any is cut, special tokens included."""
    return tuple(len(row) for row in _tokens(tokenizer, split, None, return_token_type_ids=False)["input_ids"])


def _tokens(tokenizer: Any, split: Split, max_length: int | None, *, return_token_type_ids: bool) -> Any:
    return tokenizer(
        list(split.texts),
        list(split.pairs) if split.pairs is not None else None,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=return_token_type_ids,
        verbose=False,
    )


def collate(
    encoded: Encoded,
    rows: Sequence[int],
    *,
    pad_id: int,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The rows numbered ``rows`` as one batch, padded on the right to the longest of them.

    Args:
        pad_id: the token that fills up; its attention is 0.
    Returns:
        ``input_ids``, ``attention_mask`` and, where the model has them, ``token_type_ids``, each (rows, width), int64;
        ``labels`` (rows,) where there are targets.
    """
    many = np.fromiter((encoded.lengths[row] for row in rows), dtype=np.int64, count=len(rows))
    mask = np.arange(many.max()) < many[:, None]
    batch = {"input_ids": _padded(encoded.input_ids, rows, mask, pad_id), "attention_mask": mask.astype(np.int64)}
    if encoded.type_ids is not None:
        batch["token_type_ids"] = _padded(encoded.type_ids, rows, mask, 0)
    if encoded.targets is not None:
        batch["labels"] = encoded.targets[np.asarray(rows, dtype=np.int64)]
    return {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in batch.items()}


def _padded(values: Sequence[Ids], rows: Sequence[int], mask: npt.NDArray[np.bool_], pad: int) -> npt.NDArray[np.int64]:
    filled = np.full(mask.shape, pad, dtype=np.int64)
    filled[mask] = np.concatenate([values[row] for row in rows])
    return filled
