"""Sources of data: each one small module that reads one on-disk layout exactly as it is published.

`data_prep.sources.base` says what a source is, `data_prep.sources.registry` lists them.

Part of m3d-lamed; import through `m3d`.
"""
