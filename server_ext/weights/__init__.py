"""Weight versions: received, verified, staged, applied, serving."""
