"""The operations of the model: reference.py held to numeric gradients, cpu.py held to reference.py.

An operation under test is a small function of (ops, new, x): the module that computes it, a maker of outputs,
and its inputs. It calls the forward function and returns what came out, the differentiated array first, and
`backward(d, dout)`, which calls the backward function and leaves the gradients in d. All arrays come from a
`Memory`, so that the same cases hold for every device and every type of numbers; test_cuda.py uses them too.

  - reference.py: the gradient of each operation against the slope of its own forward pass, in float64
  - cpu.py: each operation, forward and backward, against reference.py in float64, however the work is cut
  - every array lies between two guard bands, which no operation may touch; outputs hold NaN before the call
  - gradients that accumulate start at random values, gradients that are overwritten start at NaN

  B batch   T time   C channels   NH heads   HS head size   V vocabulary   Vp padded V   N = B * T rows
"""

import inspect
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import kernels
from kernels import cpu, reference
from kernels import threads as pool

GUARD = 64  # elements before and behind every array: 16-byte alignment survives
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}  # of the largest element


class Memory:
    """The arrays of one call, on one device, cut out of buffers full of NaN (or of impossible integers)."""

    def __init__(self, device, dtype):
        self.ops = kernels.load(device)
        self.dtype, self.tolerance = self.ops.DTYPES[dtype], TOLERANCE[dtype]
        self.wide = self.dtype if dtype == "float64" else np.float32  # what sums are kept in
        self.buffers = []

    def new(self, *shape, wide=False):
        """An output: nothing but NaN."""
        return self.put(np.full(shape, np.nan), wide)

    def put(self, values, wide=False):
        """An input: a copy of `values`."""
        is_integer = values.dtype.kind in "iu"
        dtype, junk = (values.dtype, 2**30) if is_integer else (self.wide if wide else self.dtype, np.nan)
        buffer = self.ops.to_device(np.full(values.size + 2 * GUARD, junk, dtype))
        view = buffer[GUARD : GUARD + values.size].reshape(values.shape)
        view[...] = self.ops.to_device(values.astype(dtype))
        self.buffers.append((buffer, is_integer))
        return view

    def get(self, array):
        """A copy on the host, in float64."""
        return self.ops.to_host(array).astype(np.float64)

    def assert_guards(self):
        for buffer, is_integer in self.buffers:
            bands = self.get(buffer)[np.r_[:GUARD, -GUARD:0]]
            assert (bands == 2**30 if is_integer else np.isnan(bands)).all(), "written beside an array"


@pytest.fixture(params=["reference", "cpu"])
def device(request):
    return request.param


@pytest.fixture(params=["float32", "float64"])
def memory(request, device):
    """The devices and types under test."""
    return Memory(device, request.param)


def normal(rng, *shape):
    """N(0, 1) in float64, of values that every type holds exactly, bfloat16 too."""
    values = rng.standard_normal(shape).astype(np.float32)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)


# ------------------------------------------------------------------------------------------------------------
# The operations


def encoder(ops, new, x):
    out = new(*x.tokens.shape, x.wte.shape[1])
    ops.encoder_forward(out, x.tokens, x.wte, x.wpe)
    return {"out": out}, lambda d, dout: ops.encoder_backward(d.wte, d.wpe, dout, x.tokens)


def layernorm(ops, new, x):
    rows = x.inp.shape[:-1]
    out, mean, rstd = new(*x.inp.shape), new(*rows, wide=True), new(*rows, wide=True)
    ops.layernorm_forward(out, mean, rstd, x.inp, x.weight, x.bias)

    def backward(d, dout):
        ops.layernorm_backward(d.inp, d.weight, d.bias, dout, x.inp, x.weight, mean, rstd)

    return {"out": out, "mean": mean, "rstd": rstd}, backward


def gelu(ops, new, x):
    out = new(*x.inp.shape)
    ops.gelu_forward(out, x.inp)
    return {"out": out}, lambda d, dout: ops.gelu_backward(d.inp, dout, x.inp)


def residual(ops, new, x):
    out = new(*x.inp.shape)
    ops.residual_forward(out, x.inp, x.branch)

    def backward(d, dout):
        d.inp[...] = d.branch[...] = dout

    return {"out": out}, backward


def matmul(ops, new, x):
    out = new(*x.inp.shape[:-1], x.weight.shape[1])
    ops.matmul_forward(out, x.inp, x.weight, x.bias)
    return {"out": out}, lambda d, dout: ops.matmul_backward(d.inp, d.weight, d.bias, dout, x.inp, x.weight)


def matmul_transposed(ops, new, x):
    """As the classifier does it: wte (V, C) is the weight from the other side, and there is no bias."""
    out = new(*x.inp.shape[:-1], x.wte.shape[0])
    ops.matmul_forward(out, x.inp, x.wte.T, None)
    return {"out": out}, lambda d, dout: ops.matmul_backward(d.inp, d.wte.T, None, dout, x.inp, x.wte.T)


def matmul_gelu(ops, new, x):
    shape = (*x.inp.shape[:-1], x.weight.shape[1])
    out, pre, dpre = new(*shape), new(*shape), new(*shape)
    ops.matmul_gelu_forward(out, pre, x.inp, x.weight, x.bias)

    def backward(d, dout):
        ops.gelu_backward(dpre, dout, pre)
        ops.matmul_backward(d.inp, d.weight, d.bias, dpre, x.inp, x.weight)

    return {"out": out, "pre": pre}, backward


def matmul_of_gelu(ops, new, x):
    """The MLP's second half: out = gelu(inp) @ weight + bias, whose backward goes down to inp at once."""
    act, out = new(*x.inp.shape), new(*x.inp.shape[:-1], x.weight.shape[1])
    ops.gelu_forward(act, x.inp)
    ops.matmul_forward(out, act, x.weight, x.bias)

    def backward(d, dout):
        ops.matmul_gelu_backward(d.inp, d.weight, d.bias, dout, act, x.weight, x.inp)

    return {"out": out}, backward


def matmul_residual(ops, new, x):
    out = new(*x.branch.shape)
    ops.matmul_residual_forward(out, x.inp, x.weight, x.bias, x.branch)

    def backward(d, dout):
        ops.matmul_backward(d.inp, d.weight, d.bias, dout, x.inp, x.weight)
        d.branch[...] = dout

    return {"out": out}, backward


def attention(ops, new, x):
    B, T, C = x.qkv.shape[0], x.qkv.shape[1], x.qkv.shape[2] // 3
    out, lse = new(B, T, C), new(B, x.n_head, T, wide=True)
    ops.attention_forward(out, lse, x.qkv, x.n_head)

    def backward(d, dout):
        ops.attention_backward(d.qkv, dout, out, lse, x.qkv, x.n_head)

    return {"out": out, "lse": lse}, backward


def classifier(ops, new, x):
    """cross_entropy forward; classifier backward, whose weights are the losses' gradients."""
    losses, again, logits = new(len(x.logits), wide=True), new(len(x.logits), wide=True), new(*x.logits.shape)
    logits[...] = x.logits
    ops.cross_entropy(losses, logits, x.targets, x.vocab_size)

    def backward(d, weights):
        d.logits[...] = x.logits
        ops.classifier(again, d.logits, x.targets, weights, x.vocab_size)
        np.testing.assert_allclose(ops.to_host(again), ops.to_host(losses), rtol=1e-4, atol=1e-5)

    return {"out": losses}, backward


# ------------------------------------------------------------------------------------------------------------
# The cases: an operation at one size. Gradients named in `adds` accumulate, the others are overwritten.


def case(operation, adds="", at="", **inputs):
    """Shapes become random arrays; anything else is taken as it is."""
    one = SimpleNamespace(operation=operation, adds=adds.split(), inputs=inputs)
    return pytest.param(one, id=f"{operation.__name__}-{at}")


def tokens(B, T, V, seed=1):
    return np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)


def rows_cases():
    """Operations on rows of C channels. The last size is more than one block of rows."""
    for shape in [(1, 1, 1), (1, 1, 600), (2, 3, 1), (2, 3, 7), (1, 129, 33), (3, 200, 129), (3, 200, 513)]:
        at, C = "x".join(map(str, shape)), shape[-1:]
        yield case(layernorm, "inp weight bias", at, inp=shape, weight=C, bias=C)
        yield case(gelu, "", at, inp=shape)
        yield case(residual, "", at, inp=shape, branch=shape)


def matmul_cases():
    """Products (..., in) @ (in, out). The last three are more than one tile, of the output or the weight; of
    these, the one with eight rows is cut into narrow parts, as in decoding."""
    small = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 129, 17, 33), (1, 200, 33, 3)]
    for B, T, I, O in [*small, (3, 211, 3, 517), (1, 8, 613, 599), (1, 64, 64, 4097)]:
        sizes = dict(inp=(B, T, I), weight=(I, O), bias=(O,))
        at = f"{B}x{T}x{I}x{O}"
        yield case(matmul, "weight bias", at, **sizes)
        yield case(matmul_transposed, "wte", at, inp=(B, T, I), wte=(O, I))
        yield case(matmul_gelu, "weight bias", at, **sizes)
        yield case(matmul_of_gelu, "weight bias", at, **sizes)
        yield case(matmul_residual, "weight bias", at, **sizes, branch=(B, T, O))


def encoder_cases():
    for B, T, C, V, P in [(1, 1, 1, 1, 1), (2, 3, 5, 4, 3), (1, 129, 7, 3, 200), (3, 200, 65, 500, 200)]:
        yield case(encoder, "wte wpe", f"{B}x{T}x{C}", tokens=tokens(B, T, V), wte=(V, C), wpe=(P, C))


def attention_cases():
    """Around the edges of blocks of 128 positions."""
    short = [(1, 1, 1, 1), (2, 3, 3, 5), (1, 127, 1, 3), (1, 128, 2, 4)]
    for B, T, NH, HS in [*short, (2, 129, 3, 4), (5, 200, 2, 7), (1, 385, 1, 8)]:
        yield case(attention, "", f"{B}x{T}x{NH}x{HS}", qkv=(B, T, 3 * NH * HS), n_head=NH)


def classifier_cases():
    for N, V, Vp in [(1, 1, 1), (1, 5, 8), (3, 128, 128), (129, 97, 128), (700, 377, 384)]:
        at = f"{N}x{V}"
        yield case(classifier, "", at, logits=(N, Vp), targets=tokens(1, N, V)[0], vocab_size=V)


CASES = [*encoder_cases(), *rows_cases(), *matmul_cases(), *attention_cases(), *classifier_cases()]
SEVERAL_BLOCKS = {
    "3x200x513",
    "3x200x65",
    "3x211x3x517",
    "1x8x613x599",
    "1x64x64x4097",
    "5x200x2x7",
    "700x377",
}
BIG = [case for case in CASES if case.id.split("-")[1] in SEVERAL_BLOCKS]
SMALL = [case for case in CASES if case.id.split("-")[1] not in SEVERAL_BLOCKS]


def drawn(case, rng):
    """The inputs of a case, on the host."""
    draw = lambda value: normal(rng, *value) if isinstance(value, tuple) else value
    return SimpleNamespace(**{name: draw(value) for name, value in case.inputs.items()})


def forward(case, memory, x):
    """Run an operation's forward on inputs x from the host. Returns its outputs and its backward."""
    arrays = {name: value for name, value in vars(x).items() if isinstance(value, np.ndarray)}
    there = {name: memory.put(value) for name, value in arrays.items()}
    outputs, backward = case.operation(memory.ops, memory.new, SimpleNamespace(**{**vars(x), **there}))
    memory.assert_guards()
    for name, value in arrays.items():
        assert np.array_equal(memory.get(there[name]), value.astype(there[name].dtype)), f"{name} was changed"
    return outputs, backward


def gradients(case, memory, x, dout, backward, rng):
    """{name: gradient} for every float input. What accumulates starts at random values, the rest at NaN."""
    starts, d = {}, SimpleNamespace()
    for name, value in vars(x).items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            adds = name in case.adds
            starts[name] = normal(rng, *value.shape) if adds else np.full(value.shape, np.nan)
            setattr(d, name, memory.put(starts[name], wide=adds and name != "inp"))
    backward(d, memory.put(dout, wide=case.operation is classifier))  # there dout are the weights
    memory.assert_guards()
    gained = {name: memory.get(getattr(d, name)) for name in starts}
    return {name: end - starts[name] if name in case.adds else end for name, end in gained.items()}


def assert_near(actual, wanted, tolerance, what):
    """Every element within `tolerance` of the largest one: that is what rounding promises."""
    assert np.isfinite(actual).all(), f"{what} is not finite"
    error, largest = np.abs(actual - wanted).max(), np.abs(wanted).max()
    assert error <= tolerance * max(largest, 1e-3), f"{what}: off by {error:.3g}, of {largest:.3g}"


# ------------------------------------------------------------------------------------------------------------
# reference.py against the slope of its forward pass, cpu.py against reference.py


@pytest.mark.parametrize("case", SMALL)
def test_backward_of_the_reference_is_the_slope(case):
    """Walk along a random direction of one input: sum(dout * out) must rise as the gradient says."""
    rng, memory = np.random.default_rng(3), Memory("reference", "float64")
    x = drawn(case, rng)
    outputs, backward = forward(case, memory, x)
    dout = normal(rng, *outputs["out"].shape)
    for name, gradient in gradients(case, memory, x, dout, backward, rng).items():
        value, direction = getattr(x, name), normal(rng, *gradient.shape)

        def along(h, name=name, value=value, direction=direction):
            moved = SimpleNamespace(**{**vars(x), name: value + h * direction})
            return (forward(case, Memory("reference", "float64"), moved)[0]["out"] * dout).sum()

        h = 1e-3
        slope = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
        error = abs(slope - (gradient * direction).sum())
        assert error <= 1e-6 * np.linalg.norm(gradient) + 1e-9, f"d{name}: slope {slope}, off by {error}"


def computed(case, memory, x):
    """All that an operation writes: (outputs, gradients), both {name: array in float64 on the host}."""
    rng = np.random.default_rng(5)
    outputs, backward = forward(case, memory, x)
    outputs = {name: memory.get(array) for name, array in outputs.items()}
    return outputs, gradients(case, memory, x, normal(rng, *outputs["out"].shape), backward, rng)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("blocks", ["large", "small"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cpu_is_the_reference(dtype, blocks, case, monkeypatch):
    """Large blocks on one thread, and blocks so small that every size has many, on three threads."""
    monkeypatch.setattr(pool, "THREADS", 1 if blocks == "large" else 3)
    if blocks == "small":
        monkeypatch.setattr(cpu, "SCORES", 100)
        for name, elements in dict(GRAIN=500, TILE=5000, SMALLEST=50).items():
            monkeypatch.setattr(pool, name, elements)
    x, memory = drawn(case, np.random.default_rng(4)), Memory("cpu", dtype)
    outputs, slopes = computed(case, memory, x)
    wanted_outputs, wanted_slopes = computed(case, Memory("reference", "float64"), x)
    assert outputs.keys() == wanted_outputs.keys()
    for name, wanted in wanted_outputs.items():
        assert_near(outputs[name], wanted, memory.tolerance, name)
    for name, wanted in wanted_slopes.items():
        assert_near(slopes[name], wanted, 5 * memory.tolerance, f"d{name}")


@pytest.mark.parametrize("case", BIG)
def test_same_bits_every_time(case):
    """On any number of threads, unless BLAS computes it: then on the same number, because the tiles of a
    product depend on it, and BLAS may round the last columns of a tile differently."""
    x, results = drawn(case, np.random.default_rng(6)), {}
    for threads in (1, 1, 2, 2, 3, 3):
        pool.THREADS = threads
        outputs, slopes = computed(case, Memory("cpu", "float32"), x)
        slopes = {"d" + name: slope for name, slope in slopes.items()}
        results.setdefault(threads, []).append(outputs | slopes)
    alone = results[1][0]
    for threads, (one, two) in results.items():
        for name in one:
            assert np.array_equal(one[name], two[name]), f"{name} differs, {threads} threads"
            if case.operation.__name__.startswith("matmul"):
                assert_near(one[name], alone[name], TOLERANCE["float32"], f"{name}, {threads} threads")
            else:
                assert np.array_equal(one[name], alone[name]), f"{name} differs from one thread's"


# ------------------------------------------------------------------------------------------------------------
# What the cases above leave out


def test_both_modules_offer_the_same():
    """Every function of reference.py that is not private to its explanations, with the same arguments."""
    helpers = {"as_rows", "split_heads", "merge_heads", "causal_scores", "log_sum_exp", "softmax"}
    functions = dict(inspect.getmembers(reference, inspect.isfunction))
    for name in functions.keys() - helpers:
        assert inspect.signature(getattr(cpu, name)) == inspect.signature(functions[name]), name


def test_devices_are_loaded_by_name():
    assert kernels.load("reference") is reference and kernels.load("cpu") is cpu
    assert kernels.choose("reference", "float64") == ("reference", "float64")
    with pytest.raises(ValueError, match='"reference", "cpu" or "cuda", not'):
        kernels.load("tpu")


def test_reading_later_is_reading_what_was_there():
    array, start = np.arange(3.0), cpu.now()
    read = cpu.read_later(array)
    array.fill(9)
    assert read().tolist() == [0, 1, 2] and 0 <= cpu.elapsed(start, cpu.now()) < 60


def test_a_sum_may_be_written_over_what_is_added(memory):
    a, b = normal(np.random.default_rng(8), 2, 2, 3, 7)
    total = memory.put(a)
    memory.ops.residual_forward(total, total, memory.put(b))
    assert_near(memory.get(total), a + b, memory.tolerance, "total")


def test_take_rows(memory):
    """Some of them twice, from a slice of longer rows."""
    inp, rows, out = (
        normal(np.random.default_rng(7), 9, 12),
        np.array([8, 0, 3, 3], np.int32),
        memory.new(4, 5),
    )
    memory.ops.take_rows(out, memory.put(inp)[:, 2:7], memory.put(rows))
    np.testing.assert_array_equal(memory.get(out), inp[rows, 2:7])
    memory.assert_guards()


@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_with_and_without_what_may_be_none(memory, transposed):
    """Bias, its gradient and the gradient of inp are optional, for weights that lie in memory either way."""
    rng, ops, put = np.random.default_rng(9), memory.ops, memory.put
    inp, weight, bias, dout = (normal(rng, *s) for s in [(2, 5, 3), (3, 7), (7,), (2, 5, 7)])

    def put_weight(array, **kind):
        return put(array.T.copy(), **kind).T if transposed else put(array, **kind)

    def assert_holds(array, wanted, what):
        assert_near(memory.get(array), wanted, memory.tolerance, what)

    w, out = put_weight(weight), memory.new(2, 5, 7)
    ops.matmul_forward(out, put(inp), w, None)
    assert_holds(out, inp @ weight, "without bias")
    ops.matmul_forward(out, put(inp), w, put(bias))
    assert_holds(out, inp @ weight + bias, "with bias")

    dw, db = put_weight(np.ones((3, 7)), wide=True), put(np.ones(7), wide=True)
    ops.matmul_backward(None, dw, db, put(dout), put(inp), w)
    wanted = np.einsum("bti,bto->io", inp, dout)
    assert_holds(dw, 1 + wanted, "dweight")
    assert_holds(db, 1 + dout.sum((0, 1)), "dbias")
    ops.matmul_backward(None, dw, None, put(dout), put(inp), w)
    assert_holds(dw, 1 + 2 * wanted, "dweight, added once more")
    memory.assert_guards()


def test_encoder_at_an_offset(memory):
    """While decoding, rows stand at different positions; padding that runs over the end does no harm."""
    rng = np.random.default_rng(10)
    ids, wte, wpe = tokens(3, 4, 11), normal(rng, 11, 5), normal(rng, 9, 5)
    offsets, out = np.array([0, 5, 7], np.int32), memory.new(3, 4, 5)
    memory.ops.encoder_forward(out, *map(memory.put, (ids, wte, wpe, offsets)))
    for b, t in np.ndindex(3, 4):
        if offsets[b] + t < 9:
            wanted = wte[ids[b, t]] + wpe[offsets[b] + t]
            assert_near(memory.get(out)[b, t], wanted, memory.tolerance, f"{b}, {t}")
    assert np.isfinite(memory.get(out)).all()
    memory.assert_guards()


def whole_attention(qkv, n_head):
    """reference.py's attention: out (B, T, C) and lse (B, NH, T)."""
    B, T, width = qkv.shape
    out, lse = np.empty((B, T, width // 3)), np.empty((B, n_head, T))
    reference.attention_forward(out, lse, qkv, n_head)
    return out, lse


@pytest.mark.parametrize("scale", [1e-3, 30, 1e4])
def test_attention_with_scores_of_any_size(memory, scale):
    """exp(1e8) would be infinite. The first position sees only itself, whatever its score."""
    rng = np.random.default_rng(11)
    qkv = normal(rng, 1, 300, 3 * 8)
    qkv[..., :16] = np.float64(memory.dtype(scale)) * qkv[..., :16]
    qkv = qkv.astype(memory.dtype).astype(np.float64)
    there = SimpleNamespace(qkv=memory.put(qkv), n_head=2)
    outputs, backward = attention(memory.ops, memory.new, there)
    wanted_out, wanted_lse = whole_attention(qkv, 2)
    np.testing.assert_array_equal(memory.get(outputs["out"])[:, 0], qkv[:, 0, 16:])
    assert_near(memory.get(outputs["lse"]), wanted_lse, memory.tolerance, "lse")
    if scale < 1e4:  # there the largest score wins by less than float32 resolves
        assert_near(memory.get(outputs["out"]), wanted_out, 100 * memory.tolerance, "out")
    d = SimpleNamespace(qkv=memory.new(*qkv.shape))
    backward(d, memory.put(normal(rng, 1, 300, 8)))
    assert np.isfinite(memory.get(d.qkv)).all()


def test_attention_sees_nothing_later(device):
    """Later positions may hold anything: not a bit of the earlier ones changes, forward or backward."""
    rng, ops = np.random.default_rng(12), kernels.load(device)
    qkv, dout = rng.standard_normal((1, 270, 3 * 4)).astype(np.float32), np.zeros((1, 270, 4), np.float32)
    dout[:, :150] = rng.standard_normal((150, 4))
    seen = []
    for later in (1, 100):
        other = qkv.copy()
        other[:, 150:] *= later
        out, lse, dqkv = np.empty_like(dout), np.empty((1, 1, 270), np.float32), np.empty_like(qkv)
        ops.attention_forward(out, lse, other, 1)
        ops.attention_backward(dqkv, dout, out, lse, other, 1)
        assert not dqkv[:, 150:].any()
        seen.append((out[:, :150], lse[:, :, :150], dqkv[:, :150]))
    for one, two in zip(*seen):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("cuts", [[1] * 6, [3, 4, 1], [1, 130, 2, 129]])
def test_attention_decode_is_attention_in_pieces(memory, cuts):
    """Rows that stand at different lengths get what attention over the whole sequence gives them."""
    rng = np.random.default_rng(13)
    lengths = np.array([0, 7, 133], np.int32)  # of what each row has in the cache already
    B, NH, HS, T = 3, 3, 5, 133 + sum(cuts)
    qkv = normal(rng, B, T, 3 * NH * HS)
    wanted, _ = whole_attention(qkv, NH)  # (B, T, C)
    k, v = qkv.reshape(B, T, 3, NH, HS).transpose(2, 0, 3, 1, 4)[1:]  # (B, NH, T, HS) each
    junk = 100 * normal(rng, 2, B, NH, T + 9, HS)  # what others have left behind each row's end

    def held(lengths):
        """What keys and values (2, B, NH, Tmax, HS) hold when the rows have these lengths."""
        both = junk.copy()
        for b, n in enumerate(lengths):
            both[:, b, :, :n] = k[b, :, :n], v[b, :, :n]
        return both.astype(memory.dtype)

    keys, values = map(memory.put, held(lengths).astype(float))
    for n_new in cuts:
        piece = np.stack([qkv[b, n : n + n_new] for b, n in enumerate(lengths)])  # (B, n_new, 3C)
        out, there = memory.new(B, n_new, NH * HS), memory.put(lengths)
        memory.ops.attention_decode(out, memory.put(piece), keys, values, there)
        np.testing.assert_array_equal(memory.get(there), lengths)
        for b, n in enumerate(lengths):
            assert_near(memory.get(out)[b], wanted[b, n : n + n_new], memory.tolerance, f"row {b}")
        lengths += n_new
        for cache, whole in zip((keys, values), held(lengths)):
            np.testing.assert_array_equal(memory.get(cache), whole)
    memory.assert_guards()


def test_classifier_with_huge_logits(memory):
    logits, targets = np.array([[1e4, -1e4, 0], [-1e30, -1e30, -1e30]]), np.array([1, 2], np.int32)
    weights = [memory.put(np.ones(2), wide=True)]
    for function, more in ((memory.ops.classifier, weights), (memory.ops.cross_entropy, [])):
        losses = memory.new(2, wide=True)
        function(losses, memory.put(logits), memory.put(targets), *more, 3)
        np.testing.assert_allclose(memory.get(losses), [2e4, np.log(3)], rtol=memory.tolerance)


# ------------------------------------------------------------------------------------------------------------
# The optimizer's operations


@pytest.mark.parametrize("n", [1, 3, 1000, 2**20 + 2**19 + 1])
def test_global_norm(memory, n):
    grads, norm = normal(np.random.default_rng(15), n), memory.new(1, wide=True)
    there = memory.put(grads, wide=True)
    memory.ops.global_norm(norm, there)
    np.testing.assert_allclose(memory.get(norm)[0], np.linalg.norm(grads), rtol=memory.tolerance)
    for bad in (np.nan, np.inf):
        there[n // 2] = bad
        memory.ops.global_norm(norm, there)
        assert not np.isfinite(memory.get(norm)[0])
    memory.assert_guards()


@pytest.mark.parametrize("n", [1, 1001])
def test_weighted_sum_adds_to_the_total(memory, n):
    values, weights = normal(np.random.default_rng(18), 2, n)
    total = memory.put(np.array([3.0]), wide=True)
    for times in (1, 2):
        memory.ops.weighted_sum(total, memory.put(values, wide=True), memory.put(weights, wide=True))
        wanted = 3 + times * np.dot(values, weights)
        np.testing.assert_allclose(memory.get(total), [wanted], rtol=10 * memory.tolerance)
    memory.assert_guards()


OVER_4 = np.nextafter(np.float32(4), np.float32(5))


@pytest.mark.parametrize(
    "norm, loss, max_norm, norm_limit, loss_limit, clip",
    [
        (0.5, 2, 1, np.inf, np.inf, 1),
        (4, 2, 1, np.inf, np.inf, 0.25),
        (4, 2, 4, np.inf, np.inf, 1),  # max_norm is exactly the norm
        (4, 2, np.inf, np.inf, np.inf, 1),
        (0, 0, 1, np.inf, np.inf, 1),
        (4, 2, 1, 4, 2, 0.25),  # at its limit a step is taken
        (OVER_4, 2, 1, 4, np.inf, -1),  # just over it, it is left out
        (2, OVER_4, 1, np.inf, 4, -1),
        (4, 2, 1, -1, np.inf, -1),
        (np.nan, 2, 1, np.inf, np.inf, -1),
        (np.inf, 2, 1, np.inf, np.inf, -1),
        (4, np.nan, 1, np.inf, np.inf, -1),
        (4, np.inf, 1, np.inf, np.inf, -1),
        (4, -np.inf, 1, np.inf, np.inf, -1),
    ],
)
@pytest.mark.parametrize("steps_before", [0, 5])
def test_plan_update(memory, norm, loss, max_norm, norm_limit, loss_limit, clip, steps_before):
    """A step that is left out is not counted: the bias corrections of the next one stay right."""
    update, steps = memory.new(4, wide=True), memory.put(np.array([steps_before], np.int32))
    numbers = [norm], [loss], [0.01, max_norm, norm_limit, loss_limit]
    inputs = [memory.put(np.array(values, np.float64), wide=True) for values in numbers]
    memory.ops.plan_update(update, steps, *inputs, 0.9, 0.95)
    n = steps_before + (clip > 0)
    assert memory.get(steps)[0] == n
    wanted = [clip, 0.01, 1 - 0.9**n, 1 - 0.95**n]
    np.testing.assert_allclose(memory.get(update), wanted, rtol=min(memory.tolerance, 1e-6))
    for array, values in zip(inputs, numbers):
        np.testing.assert_array_equal(memory.get(array), np.array(values).astype(memory.wide))
    memory.assert_guards()


def textbook_adamw(p, g, m, v, lr, beta1, beta2, eps, weight_decay, step):
    """Algorithm 2 of Loshchilov and Hutter, one number at a time."""
    p, m, v = p.copy(), m.copy(), v.copy()
    for i in range(len(p)):
        m[i] = beta1 * m[i] + (1 - beta1) * g[i]
        v[i] = beta2 * v[i] + (1 - beta2) * g[i] ** 2
        m_hat, v_hat = m[i] / (1 - beta1**step), v[i] / (1 - beta2**step)
        p[i] -= lr * (m_hat / (v_hat**0.5 + eps) + weight_decay * p[i])
    return p, m, v


@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("n", [1, 3, 1001])
def test_adamw_is_the_textbook(memory, weight_decay, n):
    """Twelve steps with changing learning rates and gradients of every size; one is clipped to nothing."""
    rng, eps = np.random.default_rng(16), 1e-4  # not the usual 1e-8, so that it counts
    p, m, v = normal(rng, n), np.zeros(n), np.zeros(n)
    params, grads, dm, dv = there = [memory.put(a, wide=True) for a in (p, np.zeros(n), m, v)]
    copy = memory.new(n)  # of params, in the type of the activations
    for step in range(1, 13):
        lr, clip = 0.01 * step, 0 if step == 5 else rng.uniform(0, 1)
        g = normal(rng, n) * 10.0 ** rng.integers(-6, 2, n)
        g[1:2] = 0
        grads[...] = memory.put(g, wide=True)
        update = memory.put(np.array([clip, lr, 1 - 0.9**step, 1 - 0.95**step]), wide=True)
        memory.ops.adamw(*there, update, 0.9, 0.95, eps, weight_decay, copy)
        np.testing.assert_array_equal(memory.get(copy), memory.get(params).astype(memory.dtype))
        assert not memory.get(grads).any()
        p, m, v = textbook_adamw(p, clip * g, m, v, lr, 0.9, 0.95, eps, weight_decay, step)
    for a, wanted, what in ((params, p, "params"), (dm, m, "m"), (dv, v, "v")):
        rtol = 100 * memory.tolerance  # of each element: those of small gradients count as well
        np.testing.assert_allclose(memory.get(a), wanted, rtol=rtol, atol=rtol * 1e-3, err_msg=what)
    memory.assert_guards()


@pytest.mark.parametrize("gradient", [np.nan, np.inf, 1.0])
def test_adamw_leaves_a_step_out(memory, gradient):
    """Nothing changes but the gradients, which are cleared."""
    params, grads, m, v = (memory.put(np.full(5, x), wide=True) for x in (1.0, gradient, 2.0, 3.0))
    update, copy = memory.put(np.array([-1.0, 1.0, 0.0, 0.0]), wide=True), memory.put(np.ones(5))
    memory.ops.adamw(params, grads, m, v, update, 0.9, 0.95, 1e-8, 0.1, copy)
    for array, wanted in ((params, 1), (grads, 0), (m, 2), (v, 3), (copy, 1)):
        np.testing.assert_array_equal(memory.get(array), wanted)


@pytest.mark.parametrize("function", ["global_norm", "adamw"])
def test_the_optimizer_has_the_same_bits_on_any_number_of_threads(function):
    rng, results = np.random.default_rng(17), []
    n = 2**21 + 77
    start = [rng.standard_normal(n).astype(np.float32) for _ in range(4)]
    start[3] **= 2  # v
    for threads in (1, 1, 2, 3):
        pool.THREADS = threads
        arrays, norm = [a.copy() for a in start], np.empty(1, np.float32)
        if function == "adamw":
            cpu.adamw(*arrays, np.array([0.5, 0.1, 0.4, 0.2]), 0.9, 0.95, 1e-8, 0.1)
        else:
            cpu.global_norm(norm, arrays[0])
        results.append([*arrays, norm] if function == "global_norm" else arrays)
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other))


# ------------------------------------------------------------------------------------------------------------
# Threads


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 100])
def test_parallel_does_every_block_once(threads, n):
    pool.THREADS, done = threads, np.zeros(n, int)

    def body(i, by):
        done[i] += by

    pool.parallel(body, ((i, 2) for i in range(n)))
    assert (done == 2).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("bad", [{0}, {57}, {99}, set(range(100))])
def test_an_error_in_a_block_reaches_the_caller(threads, bad):
    """Whichever thread has it, and the next call works."""
    pool.THREADS = threads

    def body(i):
        if i in bad:
            raise ZeroDivisionError(f"block {i}")

    with pytest.raises(ZeroDivisionError, match="block"):
        pool.parallel(body, [(i,) for i in range(100)])
    test_parallel_does_every_block_once(threads, 100)


def test_an_error_in_a_helper_reaches_the_caller():
    """The blocks wait for each other, so every thread has one; only those of the helpers fail."""
    pool.THREADS, together = 3, threading.Barrier(3, timeout=30)

    def body(_):
        together.wait()
        if threading.current_thread() is not threading.main_thread():
            raise ZeroDivisionError("in a helper")

    with pytest.raises(ZeroDivisionError, match="in a helper"):
        pool.parallel(body, [(i,) for i in range(3)])
    test_parallel_does_every_block_once(3, 100)
