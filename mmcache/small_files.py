"""Small files put in place together: a folder that several of them are in, or are made in, is made durable once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmcache.draft import Draft
from mmcache.files import make_folders, sync_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["publish_all"]


def publish_all(contents: Mapping[Path, bytes]) -> None:
    """Put small files in place, and make them, their names and their folders durable; blocks until then.

    Each is there whole or not at all, and the first ones are where a later one fails. Folders are made where there
    are none.
    """
    folders = dict.fromkeys(file.parent for file in contents)
    changed = make_folders(folders)
    for file, data in contents.items():
        draft = Draft(file)
        try:
            draft.write(np.frombuffer(data, np.uint8), 0)
            draft.publish(len(data))
        except BaseException:
            draft.discard()
            raise
    for folder in dict.fromkeys([*changed, *folders]):
        sync_folder(folder)
