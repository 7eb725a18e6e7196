"""Find what is wrong in records and stores before training does: every case is read once, everything found is listed.

`data_prep.verify.findings` says what is checked, `data_prep.verify.run` does it.

Part of m3d-lamed; import through `m3d`.
"""
