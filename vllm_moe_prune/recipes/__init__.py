"""Recipes: their schema, how they are loaded, and the shipped ones."""
