"""The operations of GPT-2, three times: reference.py in plain NumPy, to be read first, cpu.py in fast NumPy,
and cuda.py, which launches our own kernels.

All three modules define the same functions with the same arguments, so the model is written once, in gpt2.py.
"""

import importlib

from common import UserError, say


def load(device):
    """Return the module with the operations for device "reference", "cpu" or "cuda"."""
    if device not in ("reference", "cpu", "cuda"):
        raise ValueError(f'device is "reference", "cpu" or "cuda", not {device!r}')
    return importlib.import_module(f"kernels.{device}")


def choose(device, dtype, on_gpu="float32"):
    """--device and --dtype as this machine has them: device "auto" is the GPU if there is one that can be
    used.

    dtype "auto" is `on_gpu` on a GPU that can compute in it, else float32. UserError if "cuda" cannot be
    used; float32, with a notice, for bfloat16 on a GPU that has no such arithmetic.
    """
    if device in ("reference", "cpu"):
        return device, "float32" if dtype == "auto" else dtype
    try:
        ops = load("cuda")
    except ImportError as error:
        if device == "cuda":
            raise UserError(f"--device cuda cannot be used ({error}); use --device cpu") from None
        return "cpu", "float32" if dtype == "auto" else dtype
    if dtype == "auto":
        return "cuda", on_gpu if on_gpu in ops.DTYPES else "float32"
    if dtype == "bfloat16" and dtype not in ops.DTYPES:
        say("this GPU has no bfloat16 arithmetic (it came with sm_80): computing in float32")
        return "cuda", "float32"
    return "cuda", dtype
