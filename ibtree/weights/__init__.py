"""Weight versions: what they are, their files, deltas between them, ways to the server."""
