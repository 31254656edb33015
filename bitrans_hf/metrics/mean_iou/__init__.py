"""The metric as a folder that `evaluate.load` reads, here or in a Space; it needs nothing else of the package."""
