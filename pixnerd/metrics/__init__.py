"""Metrics for samples."""
