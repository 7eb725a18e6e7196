"""Published checkpoints of M3D-LaMed, M3D-CLIP and SegVol become folders of ours; no code of theirs is run."""
