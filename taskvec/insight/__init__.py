"""LOOKING AT IT: what a checkpoint, an adapter or an edit is made of. Nothing here writes a weight."""
