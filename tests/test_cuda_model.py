"""GPT-2 on a card: ten steps beside the CPU's, decoding, recomputation, files, and the two programs.

In the emulator, or on a GPU where there is one (tests/card.py). Read test_cuda.py before.
"""

import ctypes
import gc
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import card
import ml_dtypes
import numpy as np
import pytest

import data
import gpt2
import kernels
import sample
import train
from common import UserError
from distributed import World

cuda = card.cuda()
XP, gpu = cuda.xp, sys.modules[cuda.launch.__module__]
ROOT = Path(__file__).parents[1]
CONFIG = gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=128, n_positions=40, vocab_size=300)  # HS 64
ODD = gpt2.GPT2Config(n_layer=1, n_head=3, n_embd=21, n_positions=20, vocab_size=61)


def batches(config, B, T, n, seed=1):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        windows = rng.integers(0, config.vocab_size, (B, T + 1)).astype(np.int32)
        yield windows[:, :-1], windows[:, 1:]


def ten_steps(config, device, dtype, T, recompute=False):
    """(losses and norms of ten steps, the parameters after them as bytes)."""
    model = gpt2.GPT2(config, device, dtype, seed=3, recompute=recompute)
    optimizer, curve = gpt2.AdamW(model), []
    for tokens, targets in batches(config, 3, T, 10):
        loss = model.forward(tokens, targets)
        model.backward()
        curve.append([float(model.ops.to_host(value)[0]) for value in (loss, optimizer.step(1e-3))])
    return np.array(curve), model.ops.to_host(model.flat_params).tobytes()


@pytest.mark.parametrize("config, T", [(CONFIG, 33), (ODD, 19)], ids=["aligned", "odd"])
def test_ten_steps_are_the_cpus(config, T, capsys):
    """Losses and norms as NumPy's, the same bits in every run and with recomputation; prints the losses."""
    wanted, _ = ten_steps(config, "cpu", "float32", T)
    losses = [wanted[:, 0]]
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.02)):
        got, parameters = ten_steps(config, "cuda", dtype, T)
        losses.append(got[:, 0])
        assert np.abs(got - wanted)[:, 0].max() < tolerance  # losses
        assert np.abs(got / wanted - 1)[:, 1].max() < tolerance  # norms of gradients
        again, same = ten_steps(config, "cuda", dtype, T)
        assert got.tobytes() == again.tobytes() and parameters == same
        recomputed, same = ten_steps(config, "cuda", dtype, T, recompute=True)
        assert got.tobytes() == recomputed.tobytes() and parameters == same
    with capsys.disabled():
        print(f"\n\nlosses, n_embd {config.n_embd}\nstep  cpu float32  cuda float32  cuda bfloat16")
        for step, row in enumerate(zip(*losses)):
            print("{:4}  {:11.6f}  {:12.6f}  {:13.6f}".format(step + 1, *row))


@pytest.mark.parametrize("config, dtype", [(CONFIG, "bfloat16"), (ODD, "float32")], ids=["aligned", "odd"])
def test_a_recorded_step_has_the_same_bits(config, dtype, monkeypatch):
    """Long rows and short ones in turn, masks, several micro-batches, another learning rate, a step left out:
    losses, norms and parameters as without recordings."""

    def steps(device="cuda"):
        model, rng = gpt2.GPT2(config, device, dtype, seed=3), np.random.default_rng(4)
        optimizer, curve = gpt2.AdamW(model), []
        for step in range(7):
            for B, T in [(1, 7), (1, 7)] if step % 3 == 1 else [(2, 18), (1, 7)]:
                tokens, targets = next(batches(config, B, T, 1, seed=step))
                weights = rng.random((B, T)) * (rng.random((B, T)) < (0.4 if T == 7 else 1)) + np.eye(B, T)
                curve.append(model.forward(tokens, targets, weights))
                model.backward()
            limit = 0.0 if step == 4 else np.inf
            curve.append(optimizer.step(1e-3 * (step + 1), norm_limit=limit))
        recorded = [*model.recordings.values(), *optimizer.recordings.values()]
        values = [model.ops.to_host(x) for x in (*curve, model.flat_params, optimizer.m, optimizer.v)]
        return values, [r.graph for r in recorded]

    with_graphs, graphs = steps()
    assert sum(graph is not None for graph in graphs) >= 5  # forward and backward of two shapes, the update
    monkeypatch.setattr(gpu, "RECORD", False)
    without, graphs = steps()
    assert [x.tobytes() for x in with_graphs] == [x.tobytes() for x in without] and not any(graphs)
    if dtype == "float32":
        for got, wanted in zip(with_graphs[:-3], steps("cpu")[0]):  # losses and norms
            np.testing.assert_allclose(got, wanted, rtol=1e-3)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["aligned", "odd"])
def test_decoding_is_the_full_forward_pass(config, dtype, tolerance):
    """Rows of different lengths, a prompt, then steps (run, recorded, played), rows dropped and doubled."""
    model = gpt2.GPT2(config, "cuda", dtype, seed=5)
    host, rng = model.ops.to_host, np.random.default_rng(6)
    for view in model.params.values():  # larger than at the beginning, so that attention is not all even
        view[...] = model.ops.to_device((host(view).astype(np.float32) * 3).astype(model.type))
    tokens = rng.integers(0, config.vocab_size, (3, 14)).astype(np.int32)
    full = host(model.logits(tokens))  # (B, T, V)
    cache, lengths = model.new_cache(3, 18), np.array([5, 2, 4])
    rows = np.arange(3)
    decoded = [(rows, lengths - 1, model.decode(tokens[:, :5], cache, lengths))]
    for step in range(4):
        decoded.append((rows, lengths + step, model.decode(tokens[rows, lengths + step, None], cache)))
    rows = np.array([2, 0, 2, 2])
    cache.select(rows)
    for step in range(4, 8):
        at = lengths[rows] + step
        decoded.append((rows, at, model.decode(tokens[rows, at, None], cache)))
    for rows, at, logits in decoded:
        assert np.abs(host(logits) - full[rows, at]).max() < tolerance * np.abs(full).max()


@pytest.fixture
def driver(monkeypatch):
    """In the emulator, cuLaunchKernelEx in Python: runs the kernel with what the pointers point to. Returns
    the names of the kernels that were launched by it; on a card the driver launches them."""
    names, launch_overlapping = [], gpu._launch_overlapping

    def counted(function, *arguments):
        mangled = re.match(r"_Z(\d+)", function.name)  # the card's names: _Z13matmul_skinnyI...
        start, length = (mangled.end(), int(mangled[1])) if mangled else (0, None)
        names.append(function.name[start:][:length].partition("<")[0])
        launch_overlapping(function, *arguments)

    monkeypatch.setattr(gpu, "_launch_overlapping", counted)
    if XP.__version__ != "emulator":
        return names
    from emulator.launcher import Kernel  # noqa: PLC0415  of tests/, where there is no card

    def launch(config, handle, pointers, extra):
        kernel = next(x for x in gc.get_objects() if isinstance(x, Kernel) and id(x) == handle.value)
        config, stream = config._obj, XP.cuda.get_current_stream()
        attribute = config.attributes[0]
        assert (config.n_attributes, attribute.id, attribute.value, extra) == (1, 6, 1, None)
        assert ctypes.sizeof(attribute) == 72 and ctypes.sizeof(config) == 56 and config.stream == stream.ptr
        sizes = [ctypes.sizeof(ctypes.c_void_p) if ord(p.pointer) else p.bytes for p in kernel.parameters]
        values = [ctypes.string_at(pointer, size) for pointer, size in zip(pointers, sizes, strict=True)]
        values = [(ctypes.c_ubyte * len(value))(*value) for value in values]
        grid, block = kernel.check_shape(tuple(config.sizes[:3]), tuple(config.sizes[3:]), config.shared)
        stream.submit(lambda: kernel.run(grid, block, (), values, config.shared))
        return 0

    monkeypatch.setattr(Kernel, "ptr", property(id), raising=False)
    stand_in = SimpleNamespace(cuLaunchKernelEx=launch)
    stand_in.cuTensorMapEncodeTiled = gpu._driver().cuTensorMapEncodeTiled
    monkeypatch.setattr(gpu, "_driver", lambda: stand_in)
    return names


@pytest.mark.parametrize("B", [1, 3, 64])
def test_overlapping_launches_have_the_same_bits(B, driver, monkeypatch):
    """30 decode steps and more, with programmatic dependent launch and without; each kernel that is launched
    so waits, in its source, before it can end."""
    emulated = XP.__version__ == "emulator"
    n, sizes = (3, vars(CONFIG)) if emulated else (30, dict(n_positions=64, vocab_size=5000))
    model, rng = gpt2.GPT2(gpt2.GPT2Config(**sizes), "cuda", "bfloat16", seed=5), np.random.default_rng(7)
    prompt, steps = (rng.integers(0, 300, shape) for shape in ((B, 5), (n, B, 1)))
    texts = []
    for overlap in (False, True) if emulated else (False, True) * 5:
        monkeypatch.setattr(gpu, "OVERLAP", overlap)
        model.recordings.clear()
        driver.clear()
        cache = model.new_cache(B, 5 + n)
        logits = [model.decode(prompt, cache), *(model.decode(tokens, cache) for tokens in steps)]
        texts.append([model.ops.to_host(x).tobytes() for x in logits])
        assert bool(driver) == (overlap and gpu._can_overlap())
    assert all(text == texts[0] for text in texts)
    launched = set(driver)
    assert launched <= {"layernorm_forward", "matmul_skinny", "attention_decode"}
    for path in cuda.HERE.glob("*.cu"):
        for name, body in re.findall(r"^(\w+)\(.*?\{\n(.*?)^\}", path.read_text(), re.MULTILINE | re.DOTALL):
            if name in launched:
                launched.remove(name)
                assert "\n    griddepcontrol_wait();" in body, name  # not under a condition
    assert not launched


def test_rows_that_end_leave_the_recorded_step(monkeypatch):
    """Rows end one after the other, one at the end of the context: the text is the CPU's, and a step with
    the rows of the one before is replayed."""
    texts, launched, launch = {}, [], cuda.launch

    def counted(file, kernel, *args, **options):
        launched.append(kernel)
        launch(file, kernel, *args, **options)

    monkeypatch.setattr(cuda, "launch", counted)
    prompts = [[1, 2, 3], [7] * 30, [1, 2, 3], [5, 4], [9], [8, 8]]
    for device in ("cpu", "cuda"):
        model = gpt2.GPT2(CONFIG, device, "float32", seed=5)
        rows = sample.generate(model, prompts, 20, seed=1, stop_tokens=range(0, 300, 20))
        texts[device] = [(row.ids, row.finish) for row in rows]
    assert texts["cuda"] == texts["cpu"] and {"context", "stop"} <= {finish for _, finish in texts["cpu"]}
    assert len({len(ids) for ids, _ in texts["cpu"]}) > 3
    steps = launched.count("attention_decode<float, 64>") / CONFIG.n_layer
    assert steps <= 2 * 4  # run and recorded, with 6, 3, 2 and 1 rows at most


def test_a_model_travels_between_devices(tmp_path):
    model = gpt2.GPT2(CONFIG, "cuda", "bfloat16", seed=7)
    optimizer = gpt2.AdamW(model)
    tokens, targets = next(batches(CONFIG, 2, 9, 1))
    model.forward(tokens, targets)
    model.backward()
    optimizer.step(1e-3)
    model.save_pretrained(tmp_path)
    optimizer.save(tmp_path / "optimizer.safetensors")
    for device in ("cpu", "cuda"):
        other = gpt2.GPT2.from_pretrained(tmp_path, device)
        moments = gpt2.AdamW(other)
        moments.load(tmp_path / "optimizer.safetensors")
        assert (
            np.array_equal(other.ops.to_host(moments.v), model.ops.to_host(optimizer.v))
            and other.ops.to_host(moments.steps) == 1
        )
        for name, value in model.master.items():  # the float32 copy is what is saved
            assert np.array_equal(other.ops.to_host(other.params[name]), model.ops.to_host(value)), name


def test_losses_are_forwards():
    for dtype in cuda.DTYPES:
        model = gpt2.GPT2(CONFIG, "cuda", dtype)
        tokens, targets = next(batches(CONFIG, 2, 9, 1))
        one, other = (
            cuda.to_host(x) for x in (model.losses(tokens, targets), model.forward(tokens, targets))
        )
        np.testing.assert_allclose(one.mean(), other[0], rtol=1e-5)


def test_chunks_of_logits(monkeypatch):
    """Rows of logits that do not fit at once: the same losses and gradients, to rounding."""
    results = []
    for elements in (1 << 28, 256 * CONFIG.padded_vocab_size):
        monkeypatch.setattr(cuda, "LOGITS", elements)
        model = gpt2.GPT2(CONFIG, "cuda", "float32", seed=3)
        losses = model.forward(*next(batches(CONFIG, 8, 37, 1)))
        model.backward()
        results.append((cuda.to_host(losses), cuda.to_host(model.flat_grads)))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-6)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    place = tmp_path_factory.mktemp("text")
    for a in range(30):
        (place / f"{a}.txt").write_text("\n".join(f"{a} plus {b} is {a + b}." for b in range(30)))
    texts = map(str, sorted(place.glob("*.txt")))
    data.main(["text", *texts, "--out", str(place / "shards"), "--tokenizer", "bytes"])
    return place / "shards"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_and_sample(shards, tmp_path, capsys, dtype):
    """train.py from shards to a checkpoint, on from there, and sample.py from the result, all on the card."""
    sizes = "--n-layer 1 --n-head 2 --n-embd 32 --seq-len 16 --total-batch-tokens 64 --batch-size 2 --lr 1e-2"
    often = (
        "--warmup-steps 1 --eval-every 3 --eval-tokens 64 --sample-every 3 --sample-tokens 5 --save-every 3"
    )
    where = f"--data {shards} --device cuda --dtype {dtype}"

    def curve(flags):
        """The losses of a run, and its last checkpoint."""
        train.main(flags.split())
        events = map(json.loads, (tmp_path / "once" / "log.jsonl").read_text().splitlines())
        losses = [event["loss"] for event in events if event["event"] == "step"]
        return losses, max((tmp_path / "once").glob("step_*"))

    losses, last = curve(f"{where} {sizes} {often} --out {tmp_path / 'once'} --steps 6")
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert "seen" in capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    shutil.rmtree(last)  # as if it had been stopped after step 3: the same losses, and the same files
    assert curve(f"--resume --out {tmp_path / 'once'}") == (losses, last)
    assert files and files == {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    capsys.readouterr()
    prompt = "--prompt 1 --max-tokens 6 --num-samples 2 --temperature 0.5 --top-p 0.9 --seed 1 --json"
    texts = []
    for _ in range(2):
        sample.main([str(tmp_path / "once"), *prompt.split(), "--device", "cuda", "--dtype", dtype])
        texts.append(json.loads(capsys.readouterr().out)["samples"])
    assert texts[0] == texts[1] and len(texts[0][0]["ids"]) == 6


def test_nothing_waits_for_the_card_inside_a_step(shards, tmp_path, monkeypatch):
    """The order in which train.py asks the card for work and reads results, a letter for each.

    F forward, B backward, A AdamW; c a copy to be read later is asked for, r it is read; ! anything else that
    waits for the card. After the first step alone it waits, to show what the update did.
    """
    order, read_later = [], cuda.read_later

    def logged(place, name, letter):
        function = getattr(place, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            order.append(letter)
            return result

        monkeypatch.setattr(place, name, call)

    def later(array):
        read = read_later(array)
        order.append("c")

        def logged_read():
            order.append("r")
            return read()

        return logged_read

    for place, name, letter in [
        (gpt2.GPT2, "forward", "F"),
        (gpt2.GPT2, "backward", "B"),
        (gpt2.AdamW, "step", "A"),
        (cuda.xp, "asnumpy", "!"),
        (cuda, "synchronize", "!"),
    ]:
        logged(place, name, letter)
    monkeypatch.setattr(cuda, "read_later", later)
    sizes = "--n-layer 1 --n-head 2 --n-embd 32 --seq-len 16 --total-batch-tokens 64 --batch-size 2 --steps 5"
    rare = "--eval-every 0 --sample-every 0 --save-every 0"
    train.main(f"--data {shards} --device cuda {sizes} {rare} --out {tmp_path / 'run'}".split())
    step = "FB" * 2 + "A" + "cc"  # loss and norm are read when the next step has been asked for
    assert step + f"{step}rr" * 3 + "rr!" in "".join(order)


@pytest.mark.parametrize("card, flops", [("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989.5e12)])
def test_utilization_on_a_gpu_is_of_its_datasheet(monkeypatch, card, flops):
    model, world = gpt2.GPT2(ODD, "cuda", "bfloat16"), World(0, 1)
    monkeypatch.setattr(cuda, "card_name", lambda: card)
    assert train.peak_flops(model, world) == (flops, "MFU")
    monkeypatch.setattr(cuda, "card_name", lambda: "a card of tomorrow")
    monkeypatch.setattr(train, "measured_flops", lambda ops, dtype: 1e9)
    assert train.peak_flops(model, world) == (1e9, "of a matmul's rate")


def test_a_gpu_without_bfloat16(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "DTYPES", {"float32": np.float32})
    assert kernels.choose("cuda", "bfloat16") == ("cuda", "float32")
    assert "computing in float32" in capsys.readouterr().err


def test_no_gpu(monkeypatch):
    def load(device):
        raise ImportError("no NVIDIA GPU")

    monkeypatch.setattr(kernels, "load", load)
    assert kernels.choose("auto", "float32") == ("cpu", "float32")
    with pytest.raises(UserError, match=r"--device cuda cannot be used .no NVIDIA GPU.; use --device cpu"):
        kernels.choose("cuda", "float32")


BROKEN = "raise ImportError('a page') from OSError('libcudart.so.13: no such file')"
RAISES = "class cuda:\n  class runtime:\n    def getDeviceCount(): raise RuntimeError('{}')".format
OLD, NONE = "cudaErrorInsufficientDriver: insufficient", "cudaErrorNoDevice: no device"
NOT_FOUND = "no NVIDIA GPU was found, nvidia-smi is missing"


@pytest.mark.parametrize(
    "smi, cupy, says",
    [
        (True, None, "CuPy is not installed; make driver"),
        (False, None, f"{NOT_FOUND}; if there is one, CuPy is not installed; make driver"),
        (True, BROKEN, "CuPy cannot be loaded: libcudart.so.13: no such file; make driver"),
        (False, BROKEN, f"{NOT_FOUND}; if there is one, CuPy cannot be loaded: libcudart"),
        (True, RAISES(OLD), "the GPU's driver is too old for this CuPy; make driver"),
        (False, RAISES(OLD), f"{NOT_FOUND}: {OLD}"),  # what CUDA says where there is no driver at all
        (True, RAISES(NONE), f"no NVIDIA GPU was found: {NONE}"),
    ],
)
def test_cupy_that_cannot_be_used(monkeypatch, tmp_path, smi, cupy, says):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if smi else None)
    for name in ("cupy", "kernels.gpu", "kernels.cuda"):
        monkeypatch.delitem(sys.modules, name)
    if cupy is None:
        monkeypatch.setitem(sys.modules, "cupy", None)  # then `import cupy` does not find it
    else:
        (tmp_path / "cupy.py").write_text(cupy)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"--device cuda cannot be used .{re.escape(says)}"):
        kernels.choose("cuda", "float32")


def test_nvrtc_is_missing(monkeypatch):
    def compile_(**_):
        raise RuntimeError("CuPy failed to load libnvrtc.so.13: no such file")

    monkeypatch.setattr(cuda.xp, "RawModule", compile_)
    cuda.load.cache_clear()
    with pytest.raises(UserError, match=r"gelu.cu cannot be compiled .*libnvrtc.*make driver"):
        cuda.gelu_forward(cuda.zeros((1, 4)), cuda.zeros((1, 4)))


def test_memory_is_estimated_and_its_end_is_said(monkeypatch):
    config = gpt2.GPT2Config(**gpt2.PRESETS["d12"])
    sizes = [
        sum(gpt2.memory(config, 64, 1024, 2, recompute, cuda.LOGITS).values()) for recompute in (False, True)
    ]
    assert 15e9 < sizes[1] < sizes[0] < 60e9
    with pytest.raises(UserError, match=r"memory is full: 2.2 TB more .* lower --batch-size"):
        cuda.empty((1 << 40,), ml_dtypes.bfloat16)


def test_the_micro_batch_is_what_the_cards_memory_allows(shards, tmp_path, monkeypatch, capsys):
    """train.py without --batch-size on cards of different size: the rows it takes, or one line."""
    sizes = "--n-layer 1 --n-head 2 --n-embd 32 --seq-len 16 --total-batch-tokens 128 --steps 1"
    rare = "--eval-tokens 16 --sample-tokens 2"

    def rows(free, dtype, name):
        monkeypatch.setattr(cuda, "free_memory", lambda: free)
        where = f"--data {shards} --device cuda --dtype {dtype} --out {tmp_path / name}"
        train.main(f"{where} {sizes} {rare}".split())
        return json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["flags"]["batch_size"]

    assert rows(1e12, "float32", "all") == 8
    config = gpt2.read_config(tmp_path / "all" / "step_000001")
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        enough = {B: sum(gpt2.memory(config, B, 16, itemsize, False, cuda.LOGITS).values()) for B in (1, 4)}
        assert rows(enough[4] / cuda.SHARE + 1, dtype, f"{dtype}-four") == 4
        assert rows(enough[4] / cuda.SHARE - 9, dtype, f"{dtype}-two") == 2  # 3 does not divide 8
        monkeypatch.setattr(gpt2, "GPT2", None)  # nothing is allocated
        with pytest.raises(
            UserError, match=r"training takes .* are free; lower --batch-size 1, use --recomp"
        ):
            rows(enough[1] - 1, dtype, f"{dtype}-none")
        monkeypatch.undo()
    monkeypatch.setattr(cuda, "BATCH_TOKENS", 47)
    assert rows(1e12, "float32", "few") == 2


def test_the_estimate_of_memory_is_what_training_takes():
    """What CuPy's pool gave for two steps and an evaluation, beside gpt2.memory()."""
    gc.collect()
    pool, before = XP.get_default_memory_pool(), XP.get_default_memory_pool().used_bytes()
    model = gpt2.GPT2(CONFIG, "cuda", "float32")
    optimizer, weights = gpt2.AdamW(model), np.full((16, 40), 1e-3)
    for batch in batches(CONFIG, 16, 40, 2):
        model.forward(*batch, weights)
        model.backward()
        optimizer.step(1e-3)
    model.losses(*batch)
    taken, estimate = (
        pool.used_bytes() - before,
        sum(gpt2.memory(CONFIG, 16, 40, 4, False, cuda.LOGITS).values()),
    )
    assert 0.9 * taken < estimate < 1.1 * taken


@pytest.mark.skipif(XP.__version__ != "emulator", reason="a card's CuPy cannot be told where to fail")
@pytest.mark.parametrize(
    "place, name, error",
    [
        (XP, "alloc", MemoryError("Out of memory allocating 512 bytes (allocated so far: 0 bytes).")),
        (XP.cuda, "alloc_pinned_memory", RuntimeError("cudaErrorMemoryAllocation: out of memory")),
        (XP.cuda.Stream, "end_capture", RuntimeError("cudaErrorMemoryAllocation: out of memory")),
        (XP.RawModule, "get_function", RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")),
        (XP.RawKernel, "__call__", RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")),
    ],
)
def test_memory_may_end_anywhere(monkeypatch, place, name, error):
    """At the n-th allocation, recording, load or launch of training and decoding, for every n: one line."""
    config = gpt2.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=4, vocab_size=8)
    function = getattr(place, name)

    def failing(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(calls) == 0:
            raise error
        return result

    def train_and_decode():
        model = gpt2.GPT2(config, "cuda")
        optimizer, cache = gpt2.AdamW(model), model.new_cache(1, 4)
        for batch in batches(config, 1, 3, 2):
            model.forward(*batch)
            model.backward()
            optimizer.step(1e-3)
        for _ in range(3):
            model.decode([[1]], cache)

    monkeypatch.setattr(place, name, failing)
    for n in itertools.count(0, 9 if place in (XP.RawModule, XP.RawKernel) else 1):  # launches are many
        calls, gpu._scratch.buffer = itertools.count(-n), None
        gpu._free.clear()  # pinned memory that copies of earlier rounds have left
        cuda.load.cache_clear()
        try:
            train_and_decode()
        except UserError as end:
            assert re.match("the GPU's memory is full: .* needed, .* are free; lower --batch-size", str(end))
        else:
            break  # fewer than n
    assert n > 0


def test_heads_that_are_too_wide():
    config = gpt2.GPT2Config(n_layer=1, n_head=1, n_embd=136, n_positions=8, vocab_size=16)
    with pytest.raises(UserError, match="heads of 136 channels"):
        gpt2.GPT2(config, "cuda").logits([[1]])


def test_too_little_shared_memory():
    """A kernel that the card cannot hold is one clear line, and not the driver's error."""
    message = (
        r"gelu.cu: gelu_forward<float> needs 1,048,576 bytes .* \(sm_\d+\) has [\d,]+; use a GPU of sm_80"
    )
    with pytest.raises(UserError, match=message):
        cuda.launch("gelu", "gelu_forward<float>", 1, 256, shared=1 << 20)


@pytest.mark.parametrize("emulator", ["0", "1"])
def test_gpu_check_does_not_run_in_the_emulator(monkeypatch, emulator):
    def load(device):
        raise ImportError("no NVIDIA GPU was found")

    monkeypatch.setattr(kernels, "load", load)
    monkeypatch.setenv("HANDMADE_GPU", "1")
    monkeypatch.setenv("HANDMADE_EMULATOR", emulator)
    why = "HANDMADE_EMULATOR is set" if emulator == "1" else "no NVIDIA GPU was found"
    with pytest.raises(pytest.exit.Exception, match=f"these tests are to run on a GPU, and cannot: {why}"):
        card.cuda.__wrapped__()


def test_gpu_check_ends_in_time(tmp_path):
    """The recipe asks for the GPU, stops tests that take too long, says so, and still measures."""
    for name, body in (
        ("nvidia-smi", ""),
        ("python", 'echo "$HANDMADE_GPU: $*"; [ "$2" != pytest ] || sleep 9'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    command = ["make", "-o", "lint", "gpu-check", f"PY={tmp_path / 'python'}", "GPU_TESTS=1"]
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("HANDMADE_GPU", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode, "the tests did not end, and the recipe said that all is well"
    assert "1: -m pytest tests/test_cuda.py" in done.stdout
    assert "error: the tests took more than 1 seconds and were stopped" in done.stdout
    assert ": tests/bench_gpu.py --write" in done.stdout
