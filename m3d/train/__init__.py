"""Training: prepared cases, batches that share a volume, losses by name, one loop."""
