"""Folders and files that survive a kill: atomic writes, digests, journal, manifest, and what state a folder is in."""
