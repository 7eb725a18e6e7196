"""The `m3d` command: one lazy main, one file a subcommand; nothing heavy is imported before it is needed."""

from m3d.cli.main import main

__all__ = ["main"]
