"""Measures of what was drawn."""
