"""Names of structures and descriptions that do not say the name; see `data_prep.terms.dictionary`.

Part of m3d-lamed; import through `m3d`.
"""

from data_prep.terms.dictionary import (
    KINDS,
    Term,
    Terms,
    describe,
    find,
    load_terms,
    published_terms,
    read_published,
    read_terms,
)

__all__ = [
    "KINDS",
    "Term",
    "Terms",
    "describe",
    "find",
    "load_terms",
    "published_terms",
    "read_published",
    "read_terms",
]
