"""Chapters that the course can do without, each a command of its own; no file of the course imports them."""
