"""NCCL's calls with one rank, which is what one card can show: on a GPU its own NCCL, else the emulator's.

Several ranks have run on the emulator's NCCL alone (test_distributed.py).
"""

import time

import card
import ml_dtypes
import numpy as np
import pytest

from distributed import Nccl, World

cuda = card.cuda()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_nccl_of_one_rank_changes_nothing_and_takes_every_call(dtype):
    from cupy.cuda import nccl  # noqa: PLC0415  only a card, or the emulator, has it

    if not nccl.available:
        pytest.skip("there is no NCCL; nvidia-nccl-cu13 is its package")
    group = Nccl(World(0, 1), cuda)
    values = np.random.default_rng(0).standard_normal(4096).astype(dtype)
    array = cuda.to_device(values)
    for call in (group.all_reduce, group.reduce_scatter, group.all_gather, group.broadcast):
        call(array)
        assert cuda.to_host(array).tobytes() == values.tobytes(), call.__name__
    began = time.monotonic()
    group.close(deadline=began + 5)
    assert time.monotonic() - began < 4
