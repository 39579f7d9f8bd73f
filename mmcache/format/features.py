"""What a store of format version 2 uses beyond version 1, by name. FORMAT.md says what each of them is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmcache.errors import CorruptError, VersionError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FIRST_TOKENS", "IMPLEMENTED", "NEW_STORES", "checked_uses"]

FIRST_TOKENS = "first"
# The others that the format reserves are refused like any unknown name.
IMPLEMENTED = (FIRST_TOKENS,)
# What a new store with tokens uses. A cache, which has none, uses nothing and is of version 1.
NEW_STORES = (FIRST_TOKENS,)


def checked_uses(said: dict[str, Any], where: Path | str) -> tuple[str, ...]:
    """Names of the features that a root says its store uses; none in version 1.

    Raises:
        VersionError: this library does not know one of them.
        CorruptError: they are no names, or do not fit the version.
    """
    uses = said.get("uses")
    if said.get("format") == 1:
        if "uses" in said:
            raise CorruptError(f"{where} does not describe a store: version 1 has no field `uses`")
        return ()
    if not isinstance(uses, list) or not uses or not all(isinstance(name, str) for name in uses):
        raise CorruptError(f"{where} does not describe a store: `uses` is {uses!r}, not one name or more")
    unknown = [name for name in uses if name not in IMPLEMENTED]
    if unknown:
        raise VersionError(
            f"{where} uses {unknown[0]!r} of format version 2, which this library does not know (it knows "
            f"{', '.join(IMPLEMENTED)}): open it with the mmcache that made it, or upgrade"
        )
    if uses != sorted(set(uses)):
        raise CorruptError(f"{where} does not describe a store: `uses` is {uses}, not each once and sorted")
    return tuple(uses)
