"""Folders that open elsewhere, cards, uploads, and models for other runtimes."""
