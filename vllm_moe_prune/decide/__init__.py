"""Decisions: statistics and a recipe in, a plan out. Pure functions, no files."""
