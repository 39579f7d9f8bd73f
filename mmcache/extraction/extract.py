"""`mmcache.extract`: fill a store from a model and text, or go on with one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from mmcache.extraction.job import Extraction

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from mmcache.extraction.corpus import Document
    from mmcache.extraction.job import Progress
    from mmcache.extraction.special_tokens import Bos
    from mmcache.read.store import Store

__all__ = ["extract"]

_DEFAULT_CONTEXT = 1024


def extract(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Document],
    path: str | os.PathLike[str],
    *,
    sites: Sequence[str] = ("mlp_in", "mlp_out"),
    layers: Sequence[int] | None = None,
    context_length: int | None = None,
    pack: bool = False,
    bos: Bos = "auto",
    batch_size: int | Literal["auto"] = 8,
    dtype: torch.dtype | str = torch.bfloat16,
    layout: Literal["layer", "token"] = "token",
    shard_tokens: int | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    accept_numerics: bool = False,
    strict: bool = False,
    record: dict[str, Any] | None = None,
    staging: str | os.PathLike[str] | None = None,
    staging_bytes: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Store:
    """Run a model over text and store its activations; blocks until the store is complete.

    Called again with the same arguments after an interruption it goes on with the shards that are missing. Each file
    is then byte for byte that of a job never interrupted, but for `source.record` in the root, which says when and how
    the store was made, and the root's digest. With a larger `max_tokens` the store grows; with
    other `sites` a complete store gains them. Any number of processes may run the same job on one path: one plans, and
    each makes its share of the shards, by its rank where torchrun, srun or a job array gives one, then of what others
    have not begun. Each returns when the store is complete.

    Args:
        model: any model that takes token ids; it is run in eval mode, under `torch.inference_mode`, up to the last
            site that is wanted. It computes in its own dtype.
        tokenizer: a Hugging Face tokenizer.
        texts: documents: texts, or one-dimensional arrays of token ids. Each is cut into contexts, a text with the
            special tokens that the tokenizer wants around them; those that it brings itself, as chat templates write
            them, it does not get twice. `read_texts` reads them from files.
        path: the store, new or to be gone on with: a folder, or an address such as `s3://bucket/acts`. Then shards are
            made in a folder of this machine, sent behind the next ones and let go; what an interruption leaves there is
            sent by the next call. Workers need no folder that all of them see.
        sites: what to store, as in `mmcache.capture`.
        layers: the model's own layer numbers; None for all.
        context_length: tokens a context at most; None for 1,024, or what the model can do if that is less.
        pack: fill each context with documents one after the other, which then attend to each other; otherwise
            each document begins a context, and sees only itself.
        bos: `"auto"`: a context of a text begins with a BOS if the tokenizer puts one there. `"add"`: in any case, with
            the tokenizer's BOS or else that of the model's configuration, as TransformerLens and SAELens have it.
            `"none"`: without one. Documents that are token ids are left as they are.
        batch_size: contexts a forward pass; `"auto"` for the quickest, measured once and kept in the plan.
        dtype: the storage dtype.
        layout: `"token"` (training) or `"layer"`.
        shard_tokens: tokens a shard where the default (256 MiB of the widest site) does not fit.
        max_tokens: store whole contexts up to this many tokens; None for all.
        device: where the model runs; None for where it is.
        accept_numerics: go on with a store although batch size, attention, device, threads or versions differ.
        strict: refuse NaN and infinity; otherwise they are stored, counted, and warned of once.
        record: anything JSON keeps, stored beside the provenance and never compared.
        staging: that folder; None for one below `$MMCACHE_CACHE`, or `mmcache` where caches go. The plan (tokens, flags
            and sequences, about 5 bytes a token) lies there too until the store is complete.
        staging_bytes: what shards in it may take, of all workers that use it; None for 4 GiB, or a quarter of the free
            room if that is less, and at least two blocks a worker (a block is a shard of each site and, in the layer
            layout, layer).
        progress: called after each batch.

    Raises:
        UnknownSiteError, UnsupportedModelError, OutOfRangeError, ArgumentError, DtypeError: the arguments make
            no sense for this model; nothing is written.
        PlanMismatchError: the store at `path` was planned with other settings, which are listed.
        CorpusError: the texts cannot be read as text. DiskFullError: they will not fit; the numbers are given.
        NonFiniteError: with `strict`. WriteError: the disk refused. Shards that were published stay.
        RemoteError, AccessError: the bucket's server gives no answer, or refuses. What was not sent stays in `staging`.
        StoreExistsError: path or staging hold something else.
    """
    job = Extraction(
        model,
        tokenizer,
        path,
        sites=sites,
        layers=layers,
        context_length=context_length,
        pack=pack,
        bos=bos,
        batch_size=batch_size,
        dtype=dtype,
        layout=layout,
        shard_tokens=shard_tokens,
        max_tokens=max_tokens,
        device=device,
        record=record,
        staging=staging,
        staging_bytes=staging_bytes,
    )
    return job.run(texts, accept_numerics=accept_numerics, strict=strict, progress=progress)
