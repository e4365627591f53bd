"""Machinery behind the notebooks: flat, thin, imported downward only (paths -> ... -> chain)."""
