"""Measurements of what a model can do."""
