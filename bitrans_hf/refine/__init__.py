"""Scores in, better scores out: dense CRF, random walk, and the label maps that they end in."""
