"""Who can compute a problem: one module or package each, as ``contract`` asks."""
