"""The command line: data goes to stdout, progress to stderr; exit 0 fine, 1 findings, 2 usage."""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path
from typing import Any

import click

from mmcache.cli.progress import Stopped
from mmcache.errors import CorruptError, IncompleteError, MmcacheError, NonFiniteError, WriteError
from mmcache.text import visible_lines
from mmcache.urls import redacted

__all__ = ["main"]

# `mmcache/__init__.py` let Ctrl-C end the process at once; from here on, commands handle it.
if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The module of each command. Only that of the command that runs is imported, so that `info` need not wait for torch.
_COMMANDS = {
    "extract": "extract",
    "sites": "extract",
    "info": "info",
    "show": "explore",
    "stats": "explore",
    "view": "explore",
    "top": "explore",
    "find": "explore",
    "export": "ops",
    "verify": "ops",
    "repair": "ops",
    "push": "ops",
    "pull": "ops",
}


class _Group(click.Group):
    """`mmcache PATH` is `mmcache info PATH`; our errors are shown without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 -- as above
        if cmd_name not in _COMMANDS:
            return None
        found: click.Command = getattr(importlib.import_module(f"mmcache.cli.{_COMMANDS[cmd_name]}"), cmd_name)
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in _COMMANDS and ("://" in args[0] or Path(args[0]).exists()):
            args = ["info", *args]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            # The message quotes the user's input, which may hold credentials.
            said = redacted(error.message)
            if said == error.message:
                raise
            raise click.UsageError(said, error.ctx) from None
        except Stopped as stopped:
            click.echo(f"mmcache: stopped. {stopped.left}", err=True)
            sys.exit(128 + stopped.number)
        except MmcacheError as error:
            click.echo(f"mmcache: {visible_lines(str(error))}", err=True)
            # Exit code 1 for problems in files or data, 2 for wrong use.
            sys.exit(1 if isinstance(error, CorruptError | IncompleteError | NonFiniteError | WriteError) else 2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mmcache")
def main() -> None:
    """Store language-model activations on disk, and read them back.

    `mmcache PATH` is short for `mmcache info PATH`.
    """
