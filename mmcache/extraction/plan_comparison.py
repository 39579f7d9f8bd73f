"""Compare a job's settings with an existing plan: what must be equal, may be accepted, or may be added."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmcache.errors import ReadOnlyError
from mmcache.extraction.fingerprint import ProvenanceWarning, check_fingerprint
from mmcache.extraction.missing_shards import missing_of
from mmcache.extraction.provenance import compare, recorded
from mmcache.extraction.tokenization import Tokenised
from mmcache.format.manifest import read_manifest
from mmcache.format.names import check_no_links
from mmcache.format.signed_json import ROOT
from mmcache.system.arguments import outside
from mmcache.system.atomic import publish

if TYPE_CHECKING:
    from pathlib import Path

    from mmcache.extraction.settings import Settings
    from mmcache.format.manifest import Manifest

__all__ = ["changes", "check_plan", "grows", "is_recorded", "known_plan", "with_recorded"]

_REMEDY = "Give the settings of the store, or choose another path."
# The exact digest among the numerics; None for a model that is not deterministic.
_DIGEST = "activations"
_ACCEPT = (
    "These may change the last bits of an activation. Set them as they were, or go on all the same with "
    "--accept-numerics (accept_numerics=True), which is recorded."
)


def check_plan(where: Path | str, manifest: Manifest, settings: Settings, *, accept: bool) -> None:
    """Compare what needs no folder: all but the corpus and which sites are complete. Errors as `known_plan`."""
    if manifest.kind != "planned":
        raise ReadOnlyError(f"{where} holds a store that was not made by extract: choose another path")
    source = manifest.source
    # Older plans do not record this, but were made so.
    identity = {"bos": "auto", **source["identity"]}
    compare(where, "identity", identity, recorded(identity, settings.identity), _REMEDY)
    stored, asked = source["modules"], settings.modules
    shared = {name: stored[name] for name in stored if name in asked}
    compare(where, "modules", shared, {name: asked[name] for name in shared}, _REMEDY)
    most = source["max_tokens"]
    if most is not None and (settings.max_tokens or most) < most:
        remedy = "It may grow, not shrink. " + _REMEDY
        compare(where, "identity", {"max_tokens": most}, {"max_tokens": settings.max_tokens}, remedy)
    if most is None and settings.max_tokens is not None:
        compare(where, "identity", {"max_tokens": None}, {"max_tokens": settings.max_tokens}, _REMEDY)
    _compare_model(where, source, settings, accept=accept)


def known_plan(path: Path, settings: Settings, *, accept: bool) -> Manifest:
    """The existing plan, after comparing all but the corpus; writes nothing.

    Args:
        path: the store.
        settings: those of the job.
        accept: accept other numerics.

    Raises:
        PlanMismatchError: something differs; says what.
        ReadOnlyError: the store was not made by `extract`.
        LinkError: a file or folder of it is a symbolic link.
    """
    manifest = read_manifest(path)
    check_no_links(path, manifest.sites)
    check_plan(path, manifest, settings, accept=accept)
    if set(manifest.source["modules"]) != set(settings.modules):
        _compare_sites(path, manifest, settings)
    return manifest


def _compare_model(path: Path | str, source: dict[str, Any], settings: Settings, *, accept: bool) -> None:
    """Compare numerics and fingerprint; the exact digest last, since it does not show what differs."""
    numerics, known = _numerics(source, settings), [source["numerics"], *source["accepted"]]
    others = {name: value for name, value in numerics.items() if name != _DIGEST}
    if not accept and not any(_same(entry, others) for entry in known):
        compare(path, "numerics", _shared(source["numerics"], others), _shared(others, source["numerics"]), _ACCEPT)
    if "fingerprint" in source:
        check_fingerprint(path, source["fingerprint"], settings)
    if not accept and not any(_same(entry, numerics) for entry in known):
        compare(path, "numerics", _shared(source["numerics"], numerics), _shared(numerics, source["numerics"]), _ACCEPT)


def _numerics(source: dict[str, Any], settings: Settings) -> dict[str, Any]:
    if settings.any_batch:
        # The planner may have found another size to be the fastest.
        return {**settings.numerics, "batch_size": source["numerics"]["batch_size"]}
    return settings.numerics


def _shared(numerics: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """The fields of `numerics` that are also in `others`; the digest only if both models are deterministic."""
    steady = numerics.get(_DIGEST) is not None and others.get(_DIGEST) is not None
    return {name: value for name, value in numerics.items() if name in others and (name != _DIGEST or steady)}


def _same(stored: dict[str, Any], asked: dict[str, Any]) -> bool:
    return _shared(stored, asked) == _shared(asked, stored)


def _compare_sites(path: Path, manifest: Manifest, settings: Settings) -> None:
    """Refuse other sites while the plan grows, new sites in an incomplete store, and to omit incomplete sites."""
    stored, asked = set(manifest.source["modules"]), set(settings.modules)
    incomplete = stored
    if manifest.n_tokens is not None:
        incomplete = {site for site, missing in missing_of(path, manifest).items() if missing.any()}
    if grows(manifest, settings):
        why = "It can grow with the sites that it has, and be given others after that. "
    elif incomplete - asked or (incomplete and asked - stored):
        why = "More sites can be added once it is complete. "
    else:
        return
    compare(path, "identity", {"sites": sorted(stored)}, {"sites": sorted(asked)}, why + _REMEDY)


def grows(manifest: Manifest, settings: Settings) -> bool:
    """Whether more tokens are asked for than the plan has."""
    state = Tokenised.of(manifest)
    # Tokens that are stored but not in the plan are from an interrupted growth.
    more = not state.whole or state.tokens != manifest.n_tokens
    return more and manifest.source["max_tokens"] != settings.max_tokens


def changes(manifest: Manifest, settings: Settings) -> bool:
    """Whether there is something to plan, not only shards to fill."""
    return manifest.n_tokens is None or grows(manifest, settings) or bool(set(settings.modules) - set(manifest.sites))


def is_recorded(manifest: Manifest, settings: Settings) -> bool:
    """Whether the plan already records all that these settings would add."""
    return _source(manifest, settings) == manifest.source


def with_recorded(path: Path, manifest: Manifest, settings: Settings) -> Manifest:
    """The plan with accepted numerics and with what older versions did not record; written if it changed.

    Needs the store's lock if another process may plan. Warns if it adds what an older version did not record.
    """
    source = _source(manifest, settings)
    if source == manifest.source:
        return manifest
    if "fingerprint" not in manifest.source:
        warnings.warn(
            f"{path} was planned by an older mmcache, which did not record what its model computes: that of now is "
            f"taken for the same, and recorded (configuration, adapters, fingerprint)",
            ProvenanceWarning,
            stacklevel=outside(),
        )
    manifest = replace(manifest, source=source)
    publish(path, ROOT, manifest.to_json())
    return manifest


def _source(manifest: Manifest, settings: Settings) -> dict[str, Any]:
    source, numerics = dict(manifest.source), _numerics(manifest.source, settings)
    if not any(_same(entry, numerics) for entry in [source["numerics"], *source["accepted"]]):
        source["accepted"] = [*source["accepted"], numerics]
    elif _same(source["numerics"], numerics):
        source["numerics"] = {**numerics, **source["numerics"]}
    # Older plans do not record `bos`; it is known to be 'auto', and need not be added.
    added = {name: value for name, value in settings.identity.items() if name != "bos"}
    source["identity"] = {**added, **source["identity"]}
    # Shards of an older plan may hold sequences that were padded in batches with others.
    return {"fingerprint": settings.fingerprint, "equal_lengths": False, **source}
