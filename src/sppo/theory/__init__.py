"""Preference games solved exactly, claims of the papers about them, and small policies."""
