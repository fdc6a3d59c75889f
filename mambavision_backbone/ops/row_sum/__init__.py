"""Sums of what the programs of a kernel add up to, one after the other or several at once."""
