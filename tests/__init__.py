"""The tests; their folders mirror the rooms of the product."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository."""
