"""Preparation at scale: every scan is read once and becomes a small file, its records and the way back.

Part of m3d-lamed; import through `m3d`.
"""

from data_prep.prepare.job import Job
from data_prep.prepare.many import Summary, prepare
from data_prep.prepare.one import PreparedImage, prepare_case
from data_prep.prepare.runners import Local, RayCluster

__all__ = ["Job", "Local", "PreparedImage", "RayCluster", "Summary", "prepare", "prepare_case"]
