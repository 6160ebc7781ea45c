"""The operations of GPT-2, once for each device: cpu.py in NumPy, to be read first, and cuda.py, our kernels.

Both modules define the same functions with the same arguments, so the model is written once, in gpt2.py.
"""

import importlib

from console import UserError


def load(device):
    """Return the module with the operations for device "cpu" or "cuda"."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f'device is "cpu" or "cuda", not {device!r}')
    return importlib.import_module(f"kernels.{device}")


def choose(device):
    """--device: "auto" is the GPU if there is one that can be used; UserError if "cuda" cannot be."""
    if device == "cpu":
        return device
    try:
        load("cuda")
        return "cuda"
    except ImportError as error:
        if device == "cuda":
            raise UserError(f"--device cuda cannot be used ({error}); use --device cpu") from None
        return "cpu"
