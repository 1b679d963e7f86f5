"""What a run saves so that it can go on: the frontier, held blocks, the fingerprint."""
