"""The metrics of M3D-Bench, one file a kind."""
