"""Figures, tables, model cards, the cost model."""
