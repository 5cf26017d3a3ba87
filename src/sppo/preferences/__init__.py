"""Preference models, estimates from their comparisons, and the pairs chosen by them."""
