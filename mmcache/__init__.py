"""mmcache keeps language-model activations on disk and reads them back as fast as the hardware allows.

    cache = mmcache.FullActivationCache.with_capacity(n_layers=12, path="acts")
    for layer in hidden_states:                 # [seq_len, d_model] each, any device
        cache.push(layer)
    row = cache.get_position(layer=3, position=-1, device="cuda")

`create`, `append` and `open` do the same for many sequences and several sites. `extract` fills a store from a model and
text. `capture` takes activations from one forward pass. README.md has examples.
"""

import importlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Ctrl-C while the command's imports run (most of a second) ends it without a traceback. `cli`, the last of them,
# restores Python's handler. A program that uses the library keeps its own handler.
_named = Path(sys.argv[0]).name == "mmcache" if sys.argv else False
_run_as_module = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == "mmcache"
if (_named or _run_as_module) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from mmcache.format.dtypes import register_bfloat16  # noqa: E402 -- as said

if TYPE_CHECKING:
    from mmcache.errors import (
        AccessError,
        ArgumentError,
        BucketNotFoundError,
        ClosedError,
        ClusterError,
        CorpusError,
        CorruptError,
        DiskFullError,
        DtypeError,
        EmptyCacheError,
        IncompleteError,
        LinkError,
        LockedError,
        MmcacheError,
        NonFiniteError,
        OutOfRangeError,
        PlanMismatchError,
        ReadError,
        ReadOnlyError,
        RemoteError,
        ShapeError,
        StoreExistsError,
        StoreNotFoundError,
        UnknownSiteError,
        UnsupportedModelError,
        VersionError,
        WriteError,
    )
    from mmcache.extraction.corpus import read_texts
    from mmcache.extraction.fingerprint import ProvenanceWarning
    from mmcache.extraction.job import Progress, extract
    from mmcache.extraction.runner import NonFiniteWarning
    from mmcache.extraction.special_tokens import BosWarning
    from mmcache.models.capture import Captured, capture
    from mmcache.ops.export import Exported, export
    from mmcache.ops.repair import Loss, Repaired, repair
    from mmcache.ops.transfer import Transferred, pull, push
    from mmcache.ops.verify import Finding, Report, verify
    from mmcache.read.site_view import SiteView
    from mmcache.read.store import Store
    from mmcache.read.store import open_store as open  # noqa: A004 -- mmcache.open is meant to read like open
    from mmcache.training.dataset import ActivationDataset
    from mmcache.training.fetcher import Batch
    from mmcache.training.token_filter import Split
    from mmcache.write.cache import FullActivationCache
    from mmcache.write.writer import Writer, append, create

register_bfloat16()

__version__ = "0.1.0"
# Where each name is defined. It is imported when first used, since torch takes most of a second to load, and `mmcache
# info` does not need it.
_PLACES = {
    "FullActivationCache": "write.cache",
    "Captured": "models.capture",
    "capture": "models.capture",
    "read_texts": "extraction.corpus",
    "ActivationDataset": "training.dataset",
    "AccessError": "errors",
    "ArgumentError": "errors",
    "BucketNotFoundError": "errors",
    "ClosedError": "errors",
    "ClusterError": "errors",
    "CorpusError": "errors",
    "CorruptError": "errors",
    "DiskFullError": "errors",
    "DtypeError": "errors",
    "EmptyCacheError": "errors",
    "IncompleteError": "errors",
    "LockedError": "errors",
    "MmcacheError": "errors",
    "NonFiniteError": "errors",
    "OutOfRangeError": "errors",
    "PlanMismatchError": "errors",
    "ReadError": "errors",
    "ReadOnlyError": "errors",
    "RemoteError": "errors",
    "ShapeError": "errors",
    "StoreExistsError": "errors",
    "StoreNotFoundError": "errors",
    "UnknownSiteError": "errors",
    "UnsupportedModelError": "errors",
    "LinkError": "errors",
    "VersionError": "errors",
    "WriteError": "errors",
    "Exported": "ops.export",
    "export": "ops.export",
    "Progress": "extraction.job",
    "extract": "extraction.job",
    "NonFiniteWarning": "extraction.runner",
    "ProvenanceWarning": "extraction.fingerprint",
    "Finding": "ops.verify",
    "Report": "ops.verify",
    "BosWarning": "extraction.special_tokens",
    "Loss": "ops.repair",
    "Repaired": "ops.repair",
    "repair": "ops.repair",
    "SiteView": "read.site_view",
    "Split": "training.token_filter",
    "Store": "read.store",
    "open": "read.store",
    "Batch": "training.fetcher",
    "Transferred": "ops.transfer",
    "pull": "ops.transfer",
    "push": "ops.transfer",
    "verify": "ops.verify",
    "Writer": "write.writer",
    "append": "write.writer",
    "create": "write.writer",
}
_RENAMED = {"open": "open_store"}
__all__ = [
    "AccessError",
    "ActivationDataset",
    "ArgumentError",
    "Batch",
    "BosWarning",
    "BucketNotFoundError",
    "Captured",
    "ClosedError",
    "ClusterError",
    "CorpusError",
    "CorruptError",
    "DiskFullError",
    "DtypeError",
    "EmptyCacheError",
    "Exported",
    "Finding",
    "FullActivationCache",
    "IncompleteError",
    "LinkError",
    "LockedError",
    "Loss",
    "MmcacheError",
    "NonFiniteError",
    "NonFiniteWarning",
    "OutOfRangeError",
    "PlanMismatchError",
    "Progress",
    "ProvenanceWarning",
    "ReadError",
    "ReadOnlyError",
    "RemoteError",
    "Repaired",
    "Report",
    "ShapeError",
    "SiteView",
    "Split",
    "Store",
    "StoreExistsError",
    "StoreNotFoundError",
    "Transferred",
    "UnknownSiteError",
    "UnsupportedModelError",
    "VersionError",
    "WriteError",
    "Writer",
    "append",
    "capture",
    "cluster",
    "create",
    "export",
    "extract",
    "open",
    "pull",
    "push",
    "read_texts",
    "repair",
    "verify",
    "view",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in ("cluster", "view"):
        return importlib.import_module(f"mmcache.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'mmcache' has no attribute {name!r}")
    module = importlib.import_module(f"mmcache.{_PLACES[name]}")
    found = getattr(module, _RENAMED.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
