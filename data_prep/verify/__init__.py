"""Find what is wrong in records and stores before training does: every case is read once, everything found is listed.

Part of m3d-lamed; import through `m3d`.
"""

from data_prep.verify.findings import CHECKS, Finding, Report
from data_prep.verify.run import Settings, verify

__all__ = ["CHECKS", "Finding", "Report", "Settings", "verify"]
