"""Operators of the backbone."""
