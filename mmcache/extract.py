"""The job that fills a store from a model and text: plan, fill, resume."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmcache.capture import capture, probe
from mmcache.dtypes import activation_dtype
from mmcache.errors import ArgumentError
from mmcache.fill import Batches, Fill, forward
from mmcache.manifest import is_store, read_manifest
from mmcache.plan import Settings, open_plan
from mmcache.provenance import model_identity, model_record, numerics, site_modules, tokenizer_identity
from mmcache.sites import resolve, unwrap
from mmcache.store import Store, open_store
from mmcache.summary import load_summary, save_summary
from mmcache.survey import Survey, quickest_batch, survey_contexts, survey_plan

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

    from mmcache.corpus import Document

__all__ = ["Extraction", "Progress", "extract"]

_DEFAULT_CONTEXT = 1024


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    `phase` is `"tokenise"` or `"extract"`; `tokens` of `total` (0: not known yet) are done, in this run or
    before; `run_tokens` went through the model in this run, and `bytes` were handed to the disk, in `seconds`.
    """

    phase: Literal["tokenise", "extract"]
    tokens: int
    total: int
    run_tokens: int
    bytes: int
    seconds: float


class Extraction:
    """A job that was checked against its model, and has written nothing yet: `survey` it or `run` it.

    Takes the arguments of `extract`, and raises what it raises for those that make no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        path: str | os.PathLike[str],
        *,
        sites: Sequence[str] = ("mlp_in", "mlp_out"),
        layers: Sequence[int] | None = None,
        context_length: int | None = None,
        pack: bool = False,
        batch_size: int | Literal["auto"] = 8,
        dtype: torch.dtype | str = torch.bfloat16,
        layout: Literal["layer", "token"] = "token",
        shard_tokens: int | None = None,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        self._path, self._tokenizer, self._model = Path(path), tokenizer, unwrap(model)
        _check_options(layout, max_tokens)
        self._asked_sites, self._asked_layers = sites, layers
        resolved = resolve(self._model, sites, layers)
        storage = activation_dtype(dtype).name
        if device is not None:
            self._model.to(device)
        self._device = next((weight.device for weight in self._model.parameters()), torch.device("cpu"))
        length = _context_length(self._model, context_length)
        with _evaluating(self._model):
            widths = probe(self._model, sites, layers)
            self._batch_size = self._resolved_batch(batch_size, length)
        self._settings = Settings(
            identity={
                **model_identity(self._model),
                "tokenizer": tokenizer_identity(tokenizer),
                "layers": list(resolved[0].layers),
                "context_length": length,
                "pack": pack,
                "dtype": storage,
                "layout": layout,
                "shard_tokens": shard_tokens,
            },
            modules=site_modules(resolved),
            numerics=numerics(self._model, self._device, self._batch_size),
            record={**model_record(self._model), **(record or {})},
            widths=widths,
            max_tokens=max_tokens,
            special_tokens=tuple(sorted(tokenizer.all_special_ids)),
            vocabulary=getattr(getattr(self._model, "config", None), "vocab_size", None),
        )
        self._settings.contexts(tokenizer)  # refuses a length without room for the special tokens

    def _resolved_batch(self, asked: int | Literal["auto"], length: int) -> int:
        """Give the batch size: for `auto` the plan's, where there is one, or the quickest."""
        if asked == "auto":
            if is_store(self._path):
                planned: int = read_manifest(self._path).source.get("numerics", {}).get("batch_size", 1)
                return planned
            with capture(self._model, self._asked_sites, self._asked_layers, stop=True) as captured:
                return quickest_batch(self._model, captured, length, self._device)
        if not isinstance(asked, int) or asked < 1:
            raise ArgumentError(f"batch_size is {asked!r}: expected a positive number of contexts, or 'auto'")
        return asked

    def survey(self, texts: Iterable[Document]) -> Survey:
        """Say what the job would take, as if nothing of it were there; writes nothing, runs three batches."""
        _check_texts(texts)
        contexts = self._settings.contexts(self._tokenizer)
        with (
            _evaluating(self._model),
            capture(self._model, self._asked_sites, self._asked_layers, stop=True) as captured,
        ):
            return survey_contexts(
                self._path,
                self._settings,
                contexts.cut(texts),
                self._batch_size,
                lambda ids, mask: forward(self._model, captured, ids, mask, self._device),
            )

    def run(
        self,
        texts: Iterable[Document],
        *,
        accept_numerics: bool = False,
        strict: bool = False,
        planned: Callable[[Survey], None] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Store:
        """Plan what is not planned, fill what is missing, and give the complete store."""
        _check_texts(texts)
        began = time.monotonic()

        def tell(phase: Literal["tokenise", "extract"], done: int, total: int, ran: int, size: int) -> None:
            if progress is not None:
                progress(Progress(phase, done, total, ran, size, time.monotonic() - began))

        manifest = open_plan(
            self._path,
            self._settings,
            self._tokenizer,
            texts,
            accept_numerics=accept_numerics,
            tokenised=lambda tokens: tell("tokenise", tokens, 0, 0, 0),
        )
        batches = Batches(self._path, manifest, self._batch_size)
        with (
            _evaluating(self._model),
            capture(self._model, self._asked_sites, self._asked_layers, stop=True) as captured,
        ):
            fill = Fill(
                self._path,
                manifest,
                batches,
                lambda spans: forward(self._model, captured, *batches.ids(spans), self._device),
                captured,
                strict=strict,
            )
            if planned is not None:
                planned(survey_plan(self._path, manifest, fill, self._batch_size))
            total = manifest.n_tokens or 0
            began = time.monotonic()
            share = fill.bytes / max(1, fill.tokens)
            before = total - fill.tokens
            fill.run(lambda done, ran: tell("extract", before + done, total, ran, int(done * share)))
        return _complete(self._path)


def _complete(path: Path) -> Store:
    """Open the store that is finished now, and keep the merged statistics in it."""
    store = open_store(path)
    manifest = read_manifest(path)
    for site in store.sites:
        if load_summary(path, manifest, site) is None:
            save_summary(path, manifest, site, store[site].statistics)
    return store


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
    batch_size: int | Literal["auto"] = 8,
    dtype: torch.dtype | str = torch.bfloat16,
    layout: Literal["layer", "token"] = "token",
    shard_tokens: int | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    accept_numerics: bool = False,
    strict: bool = False,
    record: dict[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Store:
    """Run a model over text and store its activations; blocks until the store is complete.

    Called again with the same arguments after an interruption it goes on with the shards that are missing, and
    the result is byte for byte that of a job never interrupted. With a larger `max_tokens` the store grows; with
    other `sites` a complete store gains them. Any number of processes may run the same job on one path once it is
    planned.

    Args:
        model: any model that takes token ids; it is run in eval mode, under `torch.inference_mode`, up to the last
            site that is wanted. It computes in its own dtype.
        tokenizer: a Hugging Face tokenizer.
        texts: documents: texts, or one-dimensional arrays of token ids. Each is cut into contexts, a text with the
            special tokens that the tokenizer wants around them. `read_texts` reads them from files.
        path: the store, new or to be gone on with.
        sites: what to store, as in `mmcache.capture`.
        layers: the model's own layer numbers; None for all.
        context_length: tokens a context at most; None for 1,024, or what the model can do if that is less.
        pack: fill each context with documents one after the other, which then attend to each other; otherwise
            each document begins a context, and sees only itself.
        batch_size: contexts a forward pass; `"auto"` for the quickest, measured once and kept in the plan.
        dtype: the storage dtype.
        layout: `"token"` (training) or `"layer"`.
        shard_tokens: tokens a shard where the default (256 MiB of the widest site) does not fit.
        max_tokens: store whole contexts up to this many tokens; None for all.
        device: where the model runs; None for where it is.
        accept_numerics: go on with a store although batch size, attention, device, threads or versions differ.
        strict: refuse NaN and infinity; otherwise they are stored, counted, and warned of once.
        record: anything JSON keeps, stored beside the provenance and never compared.
        progress: called after each batch.

    Raises:
        UnknownSiteError, UnsupportedModelError, OutOfRangeError, ArgumentError, DtypeError: the arguments make
            no sense for this model; nothing is written.
        PlanMismatchError: the store at `path` was planned with other settings, which are listed.
        CorpusError: the texts cannot be read as text. DiskFullError: they will not fit; the numbers are given.
        NonFiniteError: with `strict`. WriteError: the disk refused. Shards that were published stay.
    """
    job = Extraction(
        model,
        tokenizer,
        path,
        sites=sites,
        layers=layers,
        context_length=context_length,
        pack=pack,
        batch_size=batch_size,
        dtype=dtype,
        layout=layout,
        shard_tokens=shard_tokens,
        max_tokens=max_tokens,
        device=device,
        record=record,
    )
    return job.run(texts, accept_numerics=accept_numerics, strict=strict, progress=progress)


def _check_options(layout: str, max_tokens: int | None) -> None:
    if layout not in ("layer", "token"):
        raise ArgumentError(f"layout is {layout!r}: expected 'layer' or 'token'")
    if max_tokens is not None and max_tokens < 1:
        raise ArgumentError(f"max_tokens is {max_tokens}: expected a positive number of tokens")


def _check_texts(texts: Iterable[Document]) -> None:
    if isinstance(texts, str | bytes | PurePath):
        raise ArgumentError(
            f"texts is one {type(texts).__name__}: give a sequence of documents; mmcache.read_texts reads files"
        )


def _context_length(model: nn.Module, asked: int | None) -> int:
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if asked is None:
        return min(_DEFAULT_CONTEXT, most or _DEFAULT_CONTEXT)
    if asked < 1 or (most is not None and asked > most):
        raise ArgumentError(f"context_length is {asked}: expected 1 to {most or 'any number'}, what the model can do")
    return asked


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module of it back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
