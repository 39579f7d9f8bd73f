"""What users keep in a store's root: anything that JSON keeps, within bounds."""

from __future__ import annotations

import json
from typing import Any

from mmcache.errors import ArgumentError

__all__ = ["check_user_metadata"]

# Half of what a root may have.
_LIMIT = 8 << 20


def check_user_metadata(metadata: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of the user's own metadata, which survives JSON.

    Raises:
        ArgumentError: it does not.
    """
    try:
        text = json.dumps(metadata or {}, allow_nan=False, indent=2)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"metadata cannot be kept as JSON ({error}): use text, numbers, lists, dicts") from error
    copy = json.loads(text)
    if not isinstance(copy, dict) or copy != (metadata or {}):
        raise ArgumentError(f"metadata changes when kept as JSON: expected a dict with text keys, found {metadata!r}")
    size = len(text) + 6 * text.count("\n")  # as it will be indented in the root
    if size > _LIMIT:
        raise ArgumentError(
            f"metadata takes {size} bytes as JSON, and the root's zarr.json has room for {_LIMIT}: keep "
            f"it in a file of its own"
        )
    return copy
