"""One reader a family of file formats; `data_prep.read` chooses among them.

Part of m3d-lamed; import through `m3d`.

A reader raises `BadScan` without naming the file: `read_volume` puts the path in front, once.
"""

from pathlib import Path


def one_line(text: object, path: Path) -> str:
    """What a library says over several lines, as one short line without the path."""
    return " ".join(str(text).replace(str(path), path.name).split())[:160] or "no reason given"
