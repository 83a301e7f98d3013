"""Benchmarks: measured side by side in one process, recorded, and reported from the record."""
