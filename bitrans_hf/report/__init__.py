"""The page of a run: its layout, images, charts and tables."""
