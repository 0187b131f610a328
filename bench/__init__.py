"""Measurements, run from the root of the repository: python -m bench.demo."""
