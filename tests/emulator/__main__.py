"""Prints what the sanitizers need: env EMULATOR_SANITIZE=1 $(python -m emulator) python -m pytest ..."""

from . import compiler

print(" ".join(f"{name}={value}" for name, value in compiler.sanitizer_environment().items()))
