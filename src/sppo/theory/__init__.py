"""Exact preference games, what the papers claim of them, policies small enough to list."""
