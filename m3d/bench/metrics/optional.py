"""What not everybody has installed, imported where it is used."""

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Raises:
        ModuleNotFoundError: It is not installed; the message has the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{module!r} is needed here: pip install 'm3d-lamed[{extra}]'") from error
