"""Open the page in the browser, so that no other user of the machine can open it.

The address that a browser is told to open is one of its command-line arguments, which every user can list. So the
browser opens a file instead, which only its own user can read, and which redirects to the page.
"""

from __future__ import annotations

import contextlib
import functools
import html
import os
import secrets
import shutil
import tempfile
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["open_browser"]


def open_browser(
    new_url: Callable[[Callable[[], object]], str], tidy: contextlib.ExitStack, tell: Callable[[str], object]
) -> None:
    """Open an address in the browser, in the background.

    Args:
        new_url: returns the address; calls its argument once the address was used.
        tidy: removes the redirect file at exit, if it is still there.
        tell: called with a sentence if there is no browser, or the file cannot be written.
    """
    try:
        folder = _private_place() / f"mmcache-{secrets.token_hex(8)}"
        remove = functools.partial(shutil.rmtree, folder, ignore_errors=True)
        # Registered before the folder is made, so that it is always removed.
        tidy.callback(remove)
        folder.mkdir(mode=0o700)
        file = _redirect(folder / "open.html", new_url(remove))
    except OSError as error:
        tell(f"no browser is opened, since the file for it cannot be written ({error}): open the address yourself")
        return

    def opened() -> None:
        try:
            found = webbrowser.open(file.as_uri())
        except webbrowser.Error:
            found = False
        if not found:
            remove()
            tell("no browser can be opened here: open the address yourself, or say --no-browser")

    # Some browsers keep the caller waiting until they are closed.
    threading.Thread(target=opened, daemon=True).start()


def _private_place() -> Path:
    """The user's runtime folder, or the folder of temporary files."""
    own = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nothing")
    with contextlib.suppress(OSError):
        if own.is_absolute() and own.stat().st_uid == os.getuid():
            return own
    return Path(tempfile.gettempdir())


def _redirect(file: Path, url: str) -> Path:
    target = html.escape(url)
    text = (
        '<!doctype html><meta charset="utf-8"><meta name="referrer" content="no-referrer"><title>mmcache</title>'
        f'<meta http-equiv="refresh" content="0; url={target}"><a href="{target}">mmcache</a>\n'
    )
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as written:
        written.write(text)
    return file
