"""One batch of a training feed: every site's rows of the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mmcache.training.feed_plan import State

__all__ = ["Batch"]


class Batch(dict[str, torch.Tensor]):
    """A dict of the sites: `batch[site]` is `[k, n_layers, d_model]`, and row i of each is of the same token.

    It is the caller's own memory. It pickles, and DataLoader's `pin_memory=True` gives one whose sites are pinned.

    Attributes:
        positions: `[k]` int64 on the CPU: where in the store each token is.
        tokens: `[k]` int32 on the CPU: which token it is; -1 where that is not known.
        state: what `state_dict()` of the dataset was when it had yielded this batch and nothing after it.
    """

    positions: torch.Tensor
    tokens: torch.Tensor
    state: State

    @classmethod
    def of(
        cls, activations: Mapping[str, torch.Tensor], positions: torch.Tensor, tokens: torch.Tensor, state: State
    ) -> Self:
        """Put a batch together; it holds on to what it is given."""
        batch = cls(activations)
        batch.positions, batch.tokens, batch.state = positions, tokens, state
        return batch

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Give the same batch with its sites on another device; `positions` and `tokens` stay on the CPU.

        `non_blocking` is as in `torch.Tensor.to`: worth it where the batch is pinned.
        """
        moved = {site: rows.to(device, non_blocking=non_blocking) for site, rows in self.items()}
        return type(self).of(moved, self.positions, self.tokens, self.state)

    def __repr__(self) -> str:
        sites = (f"{site!r}: {list(rows.shape)} {rows.dtype} on {rows.device}" for site, rows in self.items())
        return f"Batch({', '.join(sites)})"
