"""What users keep in a store's root: anything that JSON keeps, within bounds."""

from __future__ import annotations

import json
from typing import Any

from mmcache.errors import ArgumentError
from mmcache.system.arguments import shown

__all__ = ["check_user_metadata"]

# Half of what a root may have.
_LIMIT = 8 << 20


def check_user_metadata(name: str, metadata: Any) -> dict[str, Any]:
    """A copy of the user's own metadata, which survives JSON; None is empty.

    Args:
        name: what the argument is called.
        metadata: its value.

    Raises:
        ArgumentError: it does not.
    """
    kept = {} if metadata is None else metadata
    try:
        text = json.dumps(kept, allow_nan=False, indent=2)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{name} cannot be kept as JSON ({error}): use text, numbers, lists, dicts") from error
    copy = json.loads(text)
    if not isinstance(copy, dict) or copy != kept:
        raise ArgumentError(
            f"{name} changes when kept as JSON: expected a dict with text keys, found {shown(metadata)}"
        )
    size = len(text) + 6 * text.count("\n")  # as it will be indented in the root
    if size > _LIMIT:
        raise ArgumentError(
            f"{name} takes {size} bytes as JSON, and the root's zarr.json has room for {_LIMIT}: keep "
            f"it in a file of its own"
        )
    return copy
