"""Where to cut ranges so that no answer is the usual one: quartiles of the OpenKBP training patients.

Measured on the 128 patients' uncut contours, rounded. A structure that has no constants here is only compared with
others of its scan. What anatomy always answers alike is listed too: such a question needs no picture.

Part of m3d-lamed; import through `m3d`.
"""

from collections.abc import Mapping, Sequence

Bounds = Mapping[str, Sequence[float]]

VOLUME_ML: Bounds = {
    "mandible": (45, 60, 75),
    "brainstem": (20, 25, 30),
    "right parotid": (16, 22, 30),
    "left parotid": (16, 22, 30),
    "larynx": (18, 24, 33),
}
REPORTED = ("mandible", "brainstem", "right parotid", "left parotid")  # with their volume, in every report
LENGTH_MM: Sequence[float] = (180, 240, 300)
# Along R, A, S: width, depth, height
EXTENT_MM: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]] = {
    "mandible": ((113, 121, 126), (84, 93, 101), (68, 78, 87)),
    "brainstem": ((33, 36, 39), (28, 31, 34), (54, 59, 64)),
    "right parotid": ((31, 35, 39), (37, 42, 47), (47, 52, 58)),
    "left parotid": ((31, 35, 39), (37, 42, 47), (46, 52, 58)),
    "larynx": ((32, 36, 41), (34, 39, 43), (27, 35, 42)),
}
MEAN_HU: Bounds = {
    "mandible": (640, 710, 750),
    "right parotid": (-18, 5, 24),
    "left parotid": (-20, 0, 23),
    "larynx": (-230, -180, -115),
}
DISTANCE_MM: Mapping[tuple[str, str], Sequence[float]] = {
    ("left parotid", "right parotid"): (111, 118, 124),
    ("brainstem", "larynx"): (116, 127, 135),
    ("larynx", "mandible"): (67, 73, 84),
    ("right parotid", "larynx"): (93, 98, 105),
    ("left parotid", "larynx"): (91, 98, 104),
    ("brainstem", "mandible"): (85, 88, 93),
}
ASYMMETRY_PERCENT: Bounds = {"parotid": (5, 10, 17)}
# From the top of the scan, in percent of its length
HEIGHT_PERCENT: Bounds = {
    "mandible": (33, 37, 42),
    "brainstem": (20, 25, 28),
    "right parotid": (27, 34, 39),
    "left parotid": (28, 35, 39),
    "larynx": (56, 59, 62),
}
THIRDS: Sequence[float] = (33, 67)

# Larger than the other six in nearly every patient
LARGEST_KNOWN = frozenset({"mandible"})
# Whose contour ends where the observer stops, which says nothing of their size
OPEN_ENDED = frozenset({"spinal cord", "esophagus"})
# Whose longest side is the same in nearly every patient
LONGEST_KNOWN = frozenset({"mandible", "brainstem", "spinal cord", "esophagus", "right parotid", "left parotid"})
# The end at which they leave a scan, if they do
END_KNOWN = frozenset({"brainstem", "spinal cord", "esophagus", "right parotid", "left parotid", "larynx", "mandible"})
SEVEN = END_KNOWN
# Pairs of those seven whose order varies between patients: the larger one makes up less than 3 in 4
SIDEWAYS = (("brainstem", "mandible"), ("brainstem", "larynx"), ("spinal cord", "larynx"), ("larynx", "mandible"),
            ("brainstem", "spinal cord"))  # fmt: skip
DENSER = (("esophagus", "right parotid"), ("esophagus", "left parotid"), ("brainstem", "spinal cord"),
          ("brainstem", "esophagus"), ("spinal cord", "esophagus"))  # fmt: skip
LARGER = (("brainstem", "right parotid"), ("brainstem", "left parotid"), ("brainstem", "larynx"),
          ("right parotid", "larynx"), ("left parotid", "larynx"))  # fmt: skip
CLOSER = ("spinal cord",)

# What anatomy answers outside the head and neck, by words in names; these are textbook knowledge, not measured
SERIES = frozenset({"vertebra", "vertebrae", "rib", "disc"})  # grow, and are placed, in a known order
UNEVEN_KNOWN = frozenset({"lung", "lobe", "atrium", "ventricle", "bronchus", "brachiocephalic", "diaphragm"})
HEIGHT_KNOWN = UNEVEN_KNOWN | {"kidney", "adrenal"}
END_KNOWN_WORDS = frozenset({"femur", "hip", "gluteus", "prostate", "bladder", "humerus", "brain", "skull", "face"})
MIDLINE = frozenset(
    "vertebra vertebrae sacrum sternum skull mandible larynx tongue trachea brainstem bladder prostate uterus rectum "
    "pituitary".split()
)


def says(name: str, words: frozenset[str]) -> bool:
    """Whether one of the words stands in a name."""
    return not words.isdisjoint(name.lower().split())
