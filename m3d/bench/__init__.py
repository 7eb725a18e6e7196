"""M3D-Bench: what is measured, and by which protocol."""
