"""kernels/cuda.py for tests: on the GPU if CuPy finds one, otherwise in the emulator."""

import functools
import os

import numpy as np
import pytest

import kernels


@functools.cache
def cuda():
    """The operations on a card. HANDMADE_EMULATOR=1 takes the emulator also where there is a GPU.

    HANDMADE_GPU=1, which is what `make gpu-check` sets, wants the card: without one no test is run.
    """
    try:
        if os.environ.get("HANDMADE_EMULATOR", "0") != "0":
            raise ImportError("HANDMADE_EMULATOR is set")
        return kernels.load("cuda")
    except ImportError as error:
        if os.environ.get("HANDMADE_GPU", "0") != "0":
            pytest.exit(f"these tests are to run on a GPU, and cannot: {error}", 2)
        import emulator  # noqa: PLC0415  only where it is needed

        emulator.install()
        return kernels.load("cuda")


def empty(shape, dtype):
    """An array on the card full of NaN, all bits set: the emulator's are by themselves, a card's are not."""
    array = cuda().empty(shape, dtype)
    array.reshape(-1).view(np.uint8).fill(255)
    return array
