"""The checked settings of an extraction, and the checks of its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mmcache.extraction.special_tokens import BOS_CHOICES
from mmcache.extraction.tokenization import Contexts
from mmcache.format.dtypes import BY_NAME
from mmcache.format.manifest import check_user_metadata
from mmcache.format.shard import MOST_ROWS
from mmcache.system.arguments import (
    Check,
    a_device,
    a_folder,
    a_switch,
    choice,
    count,
    either,
    layer_numbers,
    names,
    optional,
)

__all__ = ["OPTIONS", "Settings"]


# The check of each option.
OPTIONS: dict[str, Check] = {
    "sites": names,
    "layers": optional(layer_numbers),
    "context_length": optional(count(1)),
    "pack": a_switch,
    "bos": choice(*BOS_CHOICES),
    "batch_size": either("auto", count(1)),
    "layout": choice("layer", "token"),
    "shard_tokens": optional(count(1, MOST_ROWS)),
    "max_tokens": optional(count(1)),
    "device": optional(a_device),
    "record": check_user_metadata,
    "staging": optional(a_folder),
    "staging_bytes": optional(count(1)),
}


@dataclass(frozen=True)
class Settings:
    """The settings of an extraction, with what was found out about its model and tokenizer.

    `identity`, `numerics` and `record` are as in `provenance.py`. The sites (`modules`: the modules of each) and the
    corpus belong to the identity too, but are compared separately. `fingerprint` is that of the model, None if it is
    not deterministic; `hooked` lists its modules with hooks, for messages; `equal_lengths`: sequences of different
    lengths must not share a batch. `vocabulary` is the number of ids that the model has; `any_batch`: the batch size is
    `"auto"`; `model_bos` is the BOS of the model's configuration.
    """

    identity: dict[str, Any]
    modules: dict[str, list[str]]
    numerics: dict[str, Any]
    record: dict[str, Any]
    widths: dict[str, int]
    max_tokens: int | None
    special_tokens: tuple[int, ...]
    vocabulary: int | None
    fingerprint: dict[str, Any] | None = None
    hooked: tuple[str, ...] = ()
    equal_lengths: bool = False
    any_batch: bool = False
    model_bos: int | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's own layer numbers."""
        return tuple(self.identity["layers"])

    @property
    def dtype(self) -> str:
        """The storage dtype, by name."""
        return str(self.identity["dtype"])

    @property
    def layout(self) -> Literal["layer", "token"]:
        """The layout of the shards."""
        layout: Literal["layer", "token"] = self.identity["layout"]
        return layout

    @property
    def shard_tokens(self) -> int | None:
        """Tokens per shard as asked for; None for the default."""
        asked: int | None = self.identity["shard_tokens"]
        return asked

    def row_bytes(self, widths: dict[str, int]) -> list[int]:
        """Bytes of a shard's row, for each of some sites."""
        deep = len(self.layers) if self.layout == "token" else 1
        return [deep * width * BY_NAME[self.dtype].size for width in widths.values()]

    def contexts(self, tokenizer: Any, *, doubled: bool = False) -> Contexts:
        """The `Contexts` that cut documents for this job; `doubled` as in plans of format version 1."""
        identity = self.identity
        return Contexts(
            tokenizer,
            identity["context_length"],
            self.vocabulary,
            pack=identity["pack"],
            bos=identity["bos"],
            model_bos=self.model_bos,
            doubled=doubled,
        )
