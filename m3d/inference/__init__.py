"""Use: load a model, look at a scan once, ask it often, keep what was found."""
