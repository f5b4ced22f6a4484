"""MAKING IT: plan, stream, commit. The arithmetic lives in `kernel`, and only there."""
