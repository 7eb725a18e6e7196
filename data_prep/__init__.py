"""From what scanners and data sets give, to volumes and records we trust.

Part of m3d-lamed; import through `m3d`.
"""
