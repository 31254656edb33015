"""Refinement of scores: dense CRF, random walk, and the resulting label maps."""
