"""Out of the house: folders that other programs read, made of our checkpoints. One file a format; see `m3d export`."""
