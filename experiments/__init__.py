"""Questions of the lecture, a script each, answered with small models: a table, a figure, three seeds.

Each uses the course as a library and is meant to be forked. The course never imports them.
"""
