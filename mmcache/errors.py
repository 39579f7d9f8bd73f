"""Every error that mmcache raises on purpose. Each is also the builtin that a Python user would catch.

MmcacheError
├── ArgumentError (ValueError)             an invalid option or argument
├── ShapeError (ValueError)                a tensor of the wrong shape
├── DtypeError (TypeError)                 a dtype that cannot be stored, or not the one expected
├── OutOfRangeError (IndexError)           a layer or position that does not exist
├── UnknownSiteError (KeyError)            a site that the store or the model does not have
├── UnsupportedModelError (ValueError)     a model whose sites are not known
├── EmptyCacheError (ValueError)           a request that an empty cache cannot answer
├── ClosedError (ValueError)               use after close
├── ReadOnlyError (PermissionError)        a write to something opened for reading
├── StoreExistsError (FileExistsError)     the path is taken
├── StoreNotFoundError (FileNotFoundError) no store at the path
│   └── BucketNotFoundError                no such bucket
├── LockedError (BlockingIOError)          another writer has the store
├── IncompleteError (LookupError)          rows that have not been written yet
├── CorruptError (ValueError)              bytes that break the format
│   ├── LinkError                          a link below a store's folder, which may lead out of it
│   └── VersionError                       a format version that this library does not read
├── PlanMismatchError (ValueError)         a resume with other settings than the store's
├── ClusterError (ConnectionError)         no Ray cluster, or its machines cannot do the job
├── RemoteError (ConnectionError)          object storage that does not answer, or answers wrongly
├── AccessError (PermissionError)          object storage or a folder that refuses: no credentials, or no right
├── CorpusError (ValueError)               a text source that cannot be read as specified
├── NonFiniteError (ArithmeticError)       NaN or infinity although `strict` is set
├── ReadError (OSError)                    a read that the system refused; `errno` and `filename` are the system's
└── WriteError (OSError)                   a failed write; `errno` and `filename` are the system's
    └── DiskFullError                      no room, or a quota or file-size limit

Every message names the object, what was found, what was expected and what to do.
"""

from __future__ import annotations

from mmcache.urls import redacted

__all__ = [
    "AccessError",
    "ArgumentError",
    "BucketNotFoundError",
    "ClosedError",
    "ClusterError",
    "CorpusError",
    "CorruptError",
    "DiskFullError",
    "DtypeError",
    "EmptyCacheError",
    "IncompleteError",
    "LinkError",
    "LockedError",
    "MmcacheError",
    "NonFiniteError",
    "OutOfRangeError",
    "PlanMismatchError",
    "ReadError",
    "ReadOnlyError",
    "RemoteError",
    "ShapeError",
    "StoreExistsError",
    "StoreNotFoundError",
    "UnknownSiteError",
    "UnsupportedModelError",
    "VersionError",
    "WriteError",
]


class MmcacheError(Exception):
    """The base of every error that mmcache raises on purpose. Passwords and signatures are removed from its text."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(said) if isinstance(said, str) else said for said in args))


class ArgumentError(MmcacheError, ValueError):
    """An invalid option or argument."""


class ShapeError(MmcacheError, ValueError):
    """A tensor of the wrong shape."""


class DtypeError(MmcacheError, TypeError):
    """A dtype that cannot be stored, or not the one that was expected."""


class OutOfRangeError(MmcacheError, IndexError):
    """A layer or position that does not exist."""


class UnknownSiteError(MmcacheError, KeyError):
    """A site that the store or the model does not have."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which would put the sentence in quotes.
        return str(self.args[0]) if self.args else ""


class UnsupportedModelError(MmcacheError, ValueError):
    """A model whose sites are not known."""


class EmptyCacheError(MmcacheError, ValueError):
    """A request that an empty cache cannot answer."""


class ClosedError(MmcacheError, ValueError):
    """Use after close, as with Python's own files."""


class ReadOnlyError(MmcacheError, PermissionError):
    """A write to something that was opened for reading."""


class StoreExistsError(MmcacheError, FileExistsError):
    """The path is taken."""


class StoreNotFoundError(MmcacheError, FileNotFoundError):
    """There is no store at the path."""


class BucketNotFoundError(StoreNotFoundError):
    """There is no such bucket in object storage."""


class LockedError(MmcacheError, BlockingIOError):
    """Another writer has the store."""


class IncompleteError(MmcacheError, LookupError):
    """Rows that have not been written yet."""


class CorruptError(MmcacheError, ValueError):
    """Bytes on disk that break the format."""


class LinkError(CorruptError):
    """A link below the folder of a store or a cache, which may lead out of it. Links are never followed."""


class VersionError(CorruptError):
    """A format version that this library does not read."""


class PlanMismatchError(MmcacheError, ValueError):
    """A resume with other settings than the store's plan."""


class ClusterError(MmcacheError, ConnectionError):
    """No Ray cluster, or its machines cannot do the job together."""


class RemoteError(MmcacheError, ConnectionError):
    """Object storage does not answer, or answers wrongly, even after retries."""


class AccessError(MmcacheError, PermissionError):
    """Object storage or a folder refuses: there are no credentials, or they are wrong, or lack the right."""


class CorpusError(MmcacheError, ValueError):
    """A text source that cannot be read as specified."""


class NonFiniteError(MmcacheError, ArithmeticError):
    """NaN or infinity among the activations of an extraction with `strict`."""


class ReadError(MmcacheError, OSError):
    """A read that the system refused. `errno` and `filename` are the system's, if known."""


class WriteError(MmcacheError, OSError):
    """A write that the system refused. `errno` and `filename` are the system's, if known."""


class DiskFullError(WriteError):
    """No room on the device, or a quota or file-size limit was met."""
