"""Every error a caller can catch. Each is also the builtin that a Python user would catch.

MmcacheError
├── ArgumentError (ValueError)             an option or argument that makes no sense
├── ShapeError (ValueError)                a tensor of the wrong shape
├── DtypeError (TypeError)                 a dtype that cannot be stored, or not the one expected
├── OutOfRangeError (IndexError)           a layer or position that is not there
├── UnknownSiteError (KeyError)            a site that the store or the model does not have
├── UnsupportedModelError (ValueError)     a model whose sites are not known
├── EmptyCacheError (ValueError)           a question that an empty cache has no answer to
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
├── ClusterError (ConnectionError)          a Ray cluster that is not there, or whose machines cannot do the job
├── RemoteError (ConnectionError)            object storage that gives no answer, or not what was asked for
├── AccessError (PermissionError)            object storage or a folder that refuses: no credentials, or no right
├── CorpusError (ValueError)               a text source that cannot be read as asked
├── NonFiniteError (ArithmeticError)       NaN or infinity where `strict` allows none
├── ReadError (OSError)                    a read that the system refused; `errno` and `filename` are the system's
└── WriteError (OSError)                   a failed write; `errno` and `filename` are the system's
    └── DiskFullError                      no room, or a quota or file-size limit was met

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
    """The root of every error that mmcache raises on purpose. No text of one holds a password or a signature."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(said) if isinstance(said, str) else said for said in args))


class ArgumentError(MmcacheError, ValueError):
    """An option or argument that makes no sense."""


class ShapeError(MmcacheError, ValueError):
    """A tensor of the wrong shape."""


class DtypeError(MmcacheError, TypeError):
    """A dtype that cannot be stored, or not the one that was expected."""


class OutOfRangeError(MmcacheError, IndexError):
    """A layer or position that is not there."""


class UnknownSiteError(MmcacheError, KeyError):
    """A site that the store or the model does not have."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which would quote the whole sentence.
        return str(self.args[0]) if self.args else ""


class UnsupportedModelError(MmcacheError, ValueError):
    """A model whose sites are not known."""


class EmptyCacheError(MmcacheError, ValueError):
    """A question that an empty cache has no answer to."""


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
    """A link below the folder of a store or a cache, which may lead out of it: none is followed or written through."""


class VersionError(CorruptError):
    """A format version that this library does not read."""


class PlanMismatchError(MmcacheError, ValueError):
    """A resume with other settings than those the store was planned with."""


class ClusterError(MmcacheError, ConnectionError):
    """A Ray cluster that is not there, or whose machines cannot do the job together."""


class RemoteError(MmcacheError, ConnectionError):
    """Object storage that gives no answer, or not the one that was asked for, however often it is asked."""


class AccessError(MmcacheError, PermissionError):
    """Object storage or a folder that refuses: no credentials, wrong ones, or such as have no right to it."""


class CorpusError(MmcacheError, ValueError):
    """A text source that cannot be read as asked."""


class NonFiniteError(MmcacheError, ArithmeticError):
    """NaN or infinity among the activations of an extraction that was told to allow none."""


class ReadError(MmcacheError, OSError):
    """A read that the system refused. `errno` and `filename` are the system's where it gave them."""


class WriteError(MmcacheError, OSError):
    """A write that the system refused. `errno` and `filename` are the system's where it gave them."""


class DiskFullError(WriteError):
    """No room on the device, or a quota or file-size limit was met."""
