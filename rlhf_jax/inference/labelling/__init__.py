"""Pairs of answers compared by several people, on a web page."""
