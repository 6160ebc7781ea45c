"""The operations of GPT-2, once for each device: cpu.py in NumPy, to be read first, and cuda.py with our own kernels.

Both modules define the same functions with the same arguments, so the model is written once, in gpt2.py.
"""

import importlib


def load(device):
    """Return the module with the operations for device "cpu" or "cuda"."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f'device is "cpu" or "cuda", not {device!r}')
    return importlib.import_module(f"kernels.{device}")
