"""The parts of clean.py, which comes first: formats.py, rules.py, duplicates.py, counts.py, processes.py.

A reader of the course can skip this package. data.py takes pieces() and json_rows() of formats.py.
"""
