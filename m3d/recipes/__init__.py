"""One recipe a stage, each short enough to read beside the paper."""
