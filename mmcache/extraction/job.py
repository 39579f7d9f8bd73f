"""`mmcache.extract`: check a job against its model, then survey it, or plan and fill the store."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmcache.errors import LockedError
from mmcache.extraction.bucket_upload import outgoing_for
from mmcache.extraction.estimate import Survey, quickest_batch, survey_contexts, survey_plan
from mmcache.extraction.fingerprint import probe_model
from mmcache.extraction.plan import join_plan, open_plan
from mmcache.extraction.plan_comparison import check_plan, is_recorded, known_plan
from mmcache.extraction.provenance import model_record, numerics, site_modules
from mmcache.extraction.runner import Batches, ShardFiller, forward
from mmcache.extraction.settings import OPTIONS, Settings
from mmcache.extraction.special_tokens import special_ids
from mmcache.extraction.tokenization import checked_texts
from mmcache.format.dtypes import activation_dtype
from mmcache.format.manifest import is_store, read_manifest
from mmcache.models.capture import capture
from mmcache.models.identity import hooked_modules, model_identity
from mmcache.models.inference import bos_token_id, device_of, evaluating, vocabulary
from mmcache.models.inference import context_length as usable_length
from mmcache.models.sites import resolve, unwrap
from mmcache.read.store import open_store
from mmcache.stats.site_statistics import load_summary, save_summary
from mmcache.storage.tokenizer_file import tokenizer_identity
from mmcache.system.arguments import a_callable, a_path, a_switch, a_tokenizer, optional, public
from mmcache.system.launcher import find_rank
from mmcache.system.locks import FolderLock

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

    from mmcache.extraction.corpus import Document
    from mmcache.extraction.special_tokens import Bos
    from mmcache.format.manifest import Manifest
    from mmcache.read.store import Store
    from mmcache.system.launcher import Rank

__all__ = ["Extraction", "Progress", "complete", "extract"]


@dataclass(frozen=True)
class Progress:
    """The progress of a job.

    `phase` is `"tokenise"`, `"extract"`, `"wait"` while other workers plan or make the last shards, or `"upload"` while
    the last shards are sent to the bucket. `tokens` of `total` (0: not known yet) are done by all workers, `before` of
    them before this run. `run_tokens` went through the model in this process. `bytes` is the estimated size of the
    shards made in `seconds`.
    """

    phase: Literal["tokenise", "extract", "wait", "upload"]
    tokens: int
    total: int
    before: int
    run_tokens: int
    bytes: int
    seconds: float


class Extraction:
    """A job, checked against its model, that has written nothing yet: call `survey` or `run`.

    Takes the arguments of `extract`, and raises its errors for those that make no sense.
    """

    @public(path=a_path, tokenizer=a_tokenizer, **OPTIONS)
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
        bos: Bos = "auto",
        batch_size: int | Literal["auto"] = 8,
        dtype: torch.dtype | str = torch.bfloat16,
        layout: Literal["layer", "token"] = "token",
        shard_tokens: int | None = None,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        record: dict[str, Any] | None = None,
        staging: str | os.PathLike[str] | None = None,
        staging_bytes: int | None = None,
    ) -> None:
        self._outgoing = outgoing_for(path, staging, staging_bytes)
        self._path = Path(path) if self._outgoing is None else self._outgoing.folder  # where the store is made
        self._tokenizer, self._model, self._asked_sites, self._asked_layers = tokenizer, unwrap(model), sites, layers
        resolved = resolve(self._model, sites, layers)
        self._device = device_of(self._model if device is None else self._model.to(device))
        length = usable_length(self._model, context_length)
        with evaluating(self._model):
            hooked = tuple(hooked_modules(self._model))
            probe = probe_model(self._model, sites, layers, self._device, batch_size)
            self._batch_size = self._resolved_batch(batch_size, length)
        special = special_ids(tokenizer, bos, bos_token_id(self._model))
        self._settings = Settings(
            identity={
                **model_identity(self._model), "tokenizer": tokenizer_identity(tokenizer, special),
                "layers": list(resolved[0].layers), "context_length": length, "pack": pack, "bos": bos,
                "dtype": activation_dtype(dtype).name, "layout": layout, "shard_tokens": shard_tokens,
            },
            modules=site_modules(resolved),
            numerics=numerics(self._model, self._device, self._batch_size, probe.digest),
            record={**model_record(self._model), **(record or {})},
            widths=probe.widths, max_tokens=max_tokens,
            special_tokens=special, vocabulary=vocabulary(self._model), model_bos=bos_token_id(self._model),
            fingerprint=probe.fingerprint, hooked=hooked, equal_lengths=probe.padding_shows,
            any_batch=batch_size == "auto",
        )  # fmt: skip
        self._settings.contexts(tokenizer)  # refuses a length without room for the special tokens, or a missing BOS

    def _resolved_batch(self, asked: int | Literal["auto"], length: int) -> int:
        """The batch size: for `auto` that of the plan if there is one, or else the fastest."""
        if asked == "auto":
            plan = self.planned()
            if plan is not None:
                planned: int = plan.source.get("numerics", {}).get("batch_size", 1)
                return planned
            with capture(self._model, self._asked_sites, self._asked_layers, stop=True) as captured:
                return quickest_batch(self._model, captured, length, self._device)
        return asked

    def planned(self) -> Manifest | None:
        """The existing plan; None if there is none."""
        if self._outgoing is not None:
            return self._outgoing.planned()
        return read_manifest(self._path) if is_store(self._path) else None

    @public()
    def survey(self, texts: Iterable[Document]) -> Survey:
        """The survey of the whole job, as if nothing was stored yet; writes nothing, runs three batches."""
        texts = checked_texts(texts)
        contexts = self._settings.contexts(self._tokenizer)
        with (
            evaluating(self._model),
            capture(self._model, self._asked_sites, self._asked_layers, stop=True) as captured,
        ):
            return self._at(
                survey_contexts(
                    self._path,
                    self._settings,
                    contexts,
                    texts,
                    self._batch_size,
                    lambda ids, mask: forward(self._model, captured, ids, mask, self._device),
                )
            )

    def _at(self, survey: Survey) -> Survey:
        return survey if self._outgoing is None else replace(survey, staging=str(self._path))

    @public(accept_numerics=a_switch, strict=a_switch, progress=optional(a_callable))
    def run(
        self,
        texts: Iterable[Document],
        *,
        accept_numerics: bool = False,
        strict: bool = False,
        planned: Callable[[Survey], None] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Store:
        """Plan, fill what is missing, and return the complete store; arguments and errors as in `extract`.

        `planned` is called once with the survey of what is left to do.
        """
        texts = checked_texts(texts)
        rank, began = find_rank(), time.monotonic()

        def tell(
            phase: Literal["tokenise", "extract", "wait", "upload"],
            tokens: int = 0,
            total: int = 0,
            before: int = 0,
            ran: int = 0,
            size: int = 0,
        ) -> None:
            if progress is not None:
                progress(Progress(phase, tokens, total, before, ran, size, time.monotonic() - began))

        with self._sending():
            manifest = self.plan(
                texts,
                accept_numerics=accept_numerics,
                tokenised=lambda tokens: tell("tokenise", tokens),
                waiting=lambda: tell("wait"),
            )
            total = manifest.n_tokens or 0

            def filled(planned: Callable[[Survey], None] | None) -> None:
                nonlocal began
                with self.filling(manifest, rank, strict=strict) as fill:
                    if planned is not None:
                        planned(self._at(survey_plan(self._path, manifest, fill, fill.batch_size)))
                    began = time.monotonic()
                    share, before = fill.bytes / max(1, fill.tokens), total - fill.tokens

                    def told(done: int, ran: int, *, waits: bool) -> None:
                        tell("wait" if waits else "extract", before + done, total, before, ran, int(done * share))

                    fill.run(told)

            filled(planned)
            # Shards that another process left damaged are made again.
            while self._outgoing is not None and not self._outgoing.drain(lambda _: tell("upload", total, total)):
                filled(None)
            return complete(self._path) if self._outgoing is None else self._outgoing.complete()

    @contextmanager
    def _sending(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._outgoing is not None:
                self._outgoing.stop()

    def plan(
        self,
        texts: Iterable[Document],
        *,
        accept_numerics: bool = False,
        tokenised: Callable[[int], None] = lambda _tokens: None,
        waiting: Callable[[], None] = lambda: None,
    ) -> Manifest:
        """Plan, or compare with the existing plan; blocks while another worker plans."""
        plan = partial(
            open_plan,
            self._path,
            self._settings,
            self._tokenizer,
            texts,
            accept_numerics=accept_numerics,
            tokenised=tokenised,
            waiting=waiting,
        )
        if self._outgoing is None:
            return plan()
        if (there := self._outgoing.sent()) is not None:
            # Checked before the staging folder is created, and before the shards in it are sent.
            check_plan(self._outgoing.url, there, self._settings, accept=accept_numerics)
        join = partial(join_plan, self._path, self._settings, accept_numerics=accept_numerics)
        return self._outgoing.plan(tuple(self._settings.widths), plan, join, waiting)

    def join(self, *, accept_numerics: bool = False) -> Manifest:
        """Compare with the existing plan, except for the corpus, which the planner compares."""
        manifest = known_plan(self._path, self._settings, accept=accept_numerics)
        if is_recorded(manifest, self._settings):
            return manifest
        # Accepted numerics are recorded; several workers may do so at once.
        lock = FolderLock.wait(self._path, lambda: None)
        try:
            return join_plan(self._path, self._settings, accept_numerics=accept_numerics)
        finally:
            lock.release()

    @contextmanager
    def filling(self, manifest: Manifest, rank: Rank, *, strict: bool) -> Iterator[ShardFiller]:
        """A ShardFiller for the missing shards of a plan, with the model hooked and in eval mode."""
        size = manifest.source["numerics"]["batch_size"] if self._settings.any_batch else self._batch_size
        batches = Batches(self._path, manifest, size)
        with (
            evaluating(self._model),
            capture(self._model, self._asked_sites, self._asked_layers, stop=True) as captured,
        ):
            yield ShardFiller(
                self._path,
                manifest,
                batches,
                lambda spans: forward(self._model, captured, *batches.ids(spans), self._device),
                captured,
                strict=strict,
                rank=rank,
                outgoing=self._outgoing,
            )


def complete(path: Path) -> Store:
    """Open the finished store, and save its merged statistics unless another worker is doing so."""
    store = open_store(path)
    manifest = read_manifest(path)
    if all(load_summary(path, manifest, site) is not None for site in store.sites):
        return store
    try:
        lock = FolderLock(path)
    except LockedError:
        return store
    try:
        for site in store.sites:
            if load_summary(path, manifest, site) is None:
                save_summary(path, manifest, site, store[site].statistics)
    finally:
        lock.release()
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

    After an interruption, call it again with the same arguments to resume. Each file is byte-identical to that of an
    uninterrupted job, except for `source.record` in the root, which says when and how the store was made, and the
    root's digest. With a larger `max_tokens` the store grows; with other `sites` a complete store gains them. Any
    number of processes may run the same job on one path. One plans; each makes its share of the shards, by its rank if
    torchrun, srun or a job array gives one, and then shards that others have not begun. Each returns when the store is
    complete.

    Args:
        model: any model that takes token ids. It runs in eval mode, under `torch.inference_mode`, in its own dtype, up
            to the last wanted site.
        tokenizer: a Hugging Face tokenizer.
        texts: documents: texts, or one-dimensional arrays of token ids. Each is cut into contexts. Contexts of a text
            get the tokenizer's special tokens around them, but not twice if the text already has them, as from a chat
            template. `read_texts` reads documents from files.
        path: the store, new or to be resumed: a folder, or an address such as `s3://bucket/acts`. For an address,
            shards are made in a local staging folder, uploaded in the background and removed; the next call uploads
            what an interruption leaves there. Workers need no shared folder.
        sites: what to store, as in `mmcache.capture`.
        layers: the model's own layer numbers; None for all.
        context_length: the most tokens per context; None for 1,024, or the model's maximum if that is less.
        pack: fill each context with consecutive documents, which then attend to each other; otherwise each document
            begins a context and sees only itself.
        bos: `"auto"`: a context of a text begins with a BOS if the tokenizer puts one there. `"add"`: always, with the
            tokenizer's BOS or else that of the model's configuration, as in TransformerLens and SAELens. `"none"`:
            never. Documents that are token ids are left unchanged.
        batch_size: contexts per forward pass; `"auto"` for the fastest, measured once and kept in the plan.
        dtype: the storage dtype.
        layout: `"token"` (training) or `"layer"`.
        shard_tokens: tokens per shard; None for the default (256 MiB of the widest site).
        max_tokens: store whole contexts up to this many tokens; None for all.
        device: where the model runs; None for where it is.
        accept_numerics: resume although batch size, attention, device, threads or versions differ.
        strict: refuse NaN and infinity; otherwise they are stored, counted, and warned of once.
        record: a dict of JSON values, stored with the provenance and never compared.
        staging: the staging folder; None for one below `$MMCACHE_CACHE` or the user's cache folder. The plan (tokens,
            flags and sequences, about 5 bytes per token) is also there until the store is complete.
        staging_bytes: limit of the shards in it, for all workers that use it; None for 4 GiB, or a quarter of the free
            space if that is less, and at least two blocks per worker (a block is a shard of each site and, in the layer
            layout, layer).
        progress: called after each batch.

    Raises:
        UnknownSiteError, UnsupportedModelError, OutOfRangeError, ArgumentError, DtypeError: the arguments make
            no sense for this model; nothing is written.
        PlanMismatchError: the store at `path` was planned with other settings, which are listed.
        CorpusError: the texts cannot be read as text. DiskFullError: no room; gives bytes needed and free.
        NonFiniteError: with `strict`. WriteError: the disk refused a write. Published shards stay.
        RemoteError, AccessError: the bucket's server does not answer, or refuses. Unsent shards stay in `staging`.
        StoreExistsError: path or staging have other content.
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
