"""The page of a run: its layout, pictures, charts and tables."""
