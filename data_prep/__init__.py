"""From what scanners and data sets give, to volumes and records we trust.

Part of m3d-lamed; import through `m3d`.
"""

from data_prep.atomic import atomic_path, refuse_overwrite
from data_prep.boxes import Box, box_of_mask, iou, to_mm, to_norm, to_voxel
from data_prep.preprocess import Foreground, MinMax, Percentile, Prepared, Preprocess, Window
from data_prep.read import read_volume
from data_prep.volume import BadScan, Volume
from data_prep.write import write_mask, write_volume

__all__ = [
    "BadScan",
    "Box",
    "Foreground",
    "MinMax",
    "Percentile",
    "Prepared",
    "Preprocess",
    "Volume",
    "Window",
    "atomic_path",
    "box_of_mask",
    "iou",
    "read_volume",
    "refuse_overwrite",
    "to_mm",
    "to_norm",
    "to_voxel",
    "write_mask",
    "write_volume",
]
