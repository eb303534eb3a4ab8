"""Races against what one would otherwise use: python -m tests.bench train."""
