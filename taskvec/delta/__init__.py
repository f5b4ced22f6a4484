"""WHAT CHANGES: task vectors, lazily, as descriptions of differences. Nothing here reads tensor data into numbers."""
