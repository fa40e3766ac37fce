"""Experiments of papers on harmonic loss, one command a file; docs/papers.md has the results."""
