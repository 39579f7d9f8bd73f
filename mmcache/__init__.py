"""mmcache keeps language-model activations on disk and hands them back as fast as the hardware allows.

    cache = mmcache.FullActivationCache.with_capacity(n_layers=12, path="acts")
    for layer in hidden_states:                 # [seq_len, d_model] each, any device
        cache.push(layer)
    row = cache.get_position(layer=3, position=-1, device="cuda")

`create`, `append` and `open` do the same for many sequences and several sites, `extract` fills a store from a
model and text, `capture` takes activations from one forward pass. README.md shows each.
"""

from mmcache.cache import FullActivationCache
from mmcache.capture import Captured, capture
from mmcache.corpus import read_texts
from mmcache.dataset import ActivationDataset
from mmcache.dtypes import register_bfloat16
from mmcache.errors import (
    ArgumentError,
    ClosedError,
    CorpusError,
    CorruptError,
    DiskFullError,
    DtypeError,
    EmptyCacheError,
    IncompleteError,
    LockedError,
    MmcacheError,
    NonFiniteError,
    OutOfRangeError,
    PlanMismatchError,
    ReadOnlyError,
    ShapeError,
    StoreExistsError,
    StoreNotFoundError,
    UnknownSiteError,
    UnsupportedModelError,
    VersionError,
    WriteError,
)
from mmcache.export import Exported, export
from mmcache.extract import Progress, extract
from mmcache.fill import NonFiniteWarning
from mmcache.findings import Finding, Report
from mmcache.repair import Loss, Repaired, repair
from mmcache.site_view import SiteView
from mmcache.split import Split
from mmcache.store import Store
from mmcache.store import open_store as open  # noqa: A004 -- mmcache.open is meant to read like open
from mmcache.training_batch import Batch
from mmcache.verify import verify
from mmcache.writer import Writer, append, create

register_bfloat16()

__version__ = "0.1.0"
__all__ = [
    "ActivationDataset",
    "ArgumentError",
    "Batch",
    "Captured",
    "ClosedError",
    "CorpusError",
    "CorruptError",
    "DiskFullError",
    "DtypeError",
    "EmptyCacheError",
    "Exported",
    "Finding",
    "FullActivationCache",
    "IncompleteError",
    "LockedError",
    "Loss",
    "MmcacheError",
    "NonFiniteError",
    "NonFiniteWarning",
    "OutOfRangeError",
    "PlanMismatchError",
    "Progress",
    "ReadOnlyError",
    "Repaired",
    "Report",
    "ShapeError",
    "SiteView",
    "Split",
    "Store",
    "StoreExistsError",
    "StoreNotFoundError",
    "UnknownSiteError",
    "UnsupportedModelError",
    "VersionError",
    "WriteError",
    "Writer",
    "append",
    "capture",
    "create",
    "export",
    "extract",
    "open",
    "read_texts",
    "repair",
    "verify",
]
