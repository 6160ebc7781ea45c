"""kernels/cuda.py for tests: on the GPU if CuPy finds one, otherwise in the emulator."""

import functools
import os

import kernels


@functools.cache
def cuda():
    """The operations on a card. HANDMADE_EMULATOR=1 takes the emulator also where there is a GPU."""
    try:
        if os.environ.get("HANDMADE_EMULATOR", "0") != "0":
            raise ImportError
        return kernels.load("cuda")
    except ImportError:
        import emulator  # noqa: PLC0415  only where it is needed

        emulator.install()
        return kernels.load("cuda")
