"""TurboMind workspaces of both dialects, written and read."""
