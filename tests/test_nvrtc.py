"""NVRTC, the compiler on the user's machine, compiles every kernel that cuda.py can choose; no GPU needed.

For sm_80, 86 and 90: no warning, no spilled register, and what the launch asks for fits the card. For sm_75
the same of the float32 variants, which is all that may run there; for sm_89, whose tiles are those of sm_86,
and for sm_100 and sm_120 the same of what a GPT-2 launches. The Hopper kernels are compiled for sm_90a, where
a warning may also say that registers ran short (C7510 to C7512) or that setmaxnreg was ignored (C7508). At
the end of a session: a table of what training uses.

    python tests/test_nvrtc.py        the table: registers, shared memory, spills of every variant

NVRTC is a library of PyPI's (nvidia-cuda-nvrtc, and cuda_bf16.h of nvidia-cuda-runtime), called by ctypes.
With a driver that is older than CUDA 13 the Makefile installs CUDA 12's, so that compiles every kernel, too.
"""

import ctypes
import functools
import importlib.util
import itertools
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import card  # noqa: E402

cuda = card.cuda()
gpu = sys.modules[cuda.launch.__module__]
CARDS = {80: (108, 163), 86: (84, 99), 89: (128, 99), 90: (132, 227)}  # multiprocessors, KB for a block
CARDS[75] = 72, 64  # no bf16
CARDS |= {100: (148, 227), 120: (170, 99)}  # Blackwell: only what cuda.py launches there is compiled


def toolkit(version=13):
    """Where the wheels of CUDA 13 or 12 put the libraries of NVRTC and the headers, or None."""
    names = {13: ("cu13/lib", "cu13/include"), 12: ("cuda_nvrtc/lib", "cuda_runtime/include")}[version]
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations if spec else ():
        lib, include = (Path(place) / name for name in names)
        if list(lib.glob("libnvrtc.so*")):
            return lib, include
    return None


pytestmark = pytest.mark.skipif(toolkit() is None, reason="NVRTC's wheels are not installed")


@functools.cache
def nvrtc(version):
    libraries = sorted(toolkit(version)[0].glob("libnvrtc*.so*"))  # -builtins first: the other looks for it
    found = [ctypes.CDLL(str(path)) for path in libraries if ".alt." not in path.name]
    return found[-1]


# ------------------------------------------------------------------------------------------------------------
# What cuda.py can choose

WAYS = "forward", "backward"
ELEMENTWISE = "gelu_forward", "gelu_backward", "residual_forward"
ENCODER = "forward_naive", "forward", "backward_naive", "backward_wpe_naive"
USES = [  # epilogue, A_T, B_T, whether the output is float32 in any case
    ("STORE", False, False, False),  # dinp of the tied head
    ("STORE", False, True, False),  # dinp, and the logits of training
    ("STORE", False, True, True),  # the logits of decoding
    ("BIAS", False, False, False),
    ("BIAS_GELU", False, False, False),
    ("BIAS_RESIDUAL", False, False, False),
    ("GELU_GRAD", False, True, False),
    ("ACCUMULATE", True, False, True),
    ("STORE", True, False, True),  # slices of dweight
]


def as_card(capability, monkeypatch):
    """cuda.py chooses as on this card."""
    SMS, KB = CARDS[capability]
    for name, value in dict(CAPABILITY=capability, SMS=SMS, SHARED=KB * 1024).items():
        monkeypatch.setattr(cuda, name, value)


def matmuls(capability, monkeypatch):
    """Every use with every tile that _tile gives for some size on this card."""
    as_card(capability, monkeypatch)
    sizes = list(itertools.product((1, 16, 256, 768, 1 << 16), repeat=3))
    for S, (epilogue, a_t, b_t, wide) in itertools.product(("float", "bf16"), USES):
        flags = ", ".join(str(flag).lower() for flag in (a_t, b_t))
        out = "float" if wide else S
        yield f"matmul_naive<{S}, {out}, {epilogue}, {flags}>"
        for tile in sorted({cuda._tile(S, *mnk, a_t) for mnk in sizes}):
            variant = f"{epilogue}, {flags}, {', '.join(map(str, tile))}>"
            yield f"matmul_float<{variant}" if S == "float" else f"matmul_bf16<{out}, {variant}"
        few = itertools.product((1, 32, 64), (256, 1024, 1536, 4096), range(8, 6400, 512))
        for MI, BN, stages, _ in filter(None, itertools.starmap(cuda._skinny_tile, few)):
            if S == "bf16" and not a_t:
                yield f"matmul_skinny<{out}, {epilogue}, {str(b_t).lower()}, {MI}, {BN}, {stages}>"


def hopper_matmuls(monkeypatch):
    """Every tile of matmul_hopper.cu with every use, as cuda.py launches it, and the versions before it."""
    found = set()

    def launch(file, kernel, *arguments, **options):
        found.add(kernel)

    with monkeypatch.context() as patch:
        as_card(90, patch)
        for name, stand_in in without_a_card(launch).items():
            patch.setattr(cuda, name, stand_in)
        for tile, (epilogue, a_t, b_t, wide) in itertools.product(cuda.HOPPER_TILES, USES):
            if epilogue == "STORE" and a_t:
                continue  # slices of dweight, which ACCUMULATE makes
            for slices in (1, 2) if epilogue == "ACCUMULATE" else (1,):
                patch.setattr(cuda, "KERNEL_OVERRIDES", {"matmul": tile, "slices": slices})
                square, out = ghost(256, 256, dtype=cuda.DTYPES["bfloat16"]), ghost(256, 256)
                extra = square if epilogue in ("BIAS_GELU", "BIAS_RESIDUAL", "GELU_GRAD") else None
                bias = square[0] if "BIAS" in epilogue else None
                arguments = out if wide else square, square, square, a_t, b_t, epilogue, 256, 256, 256
                cuda._product(*arguments, extra, bias)
    flags = ("false, false", "false, true", "true, false")
    return (found - {"add_partials"}) | {f"matmul_hopper_simple<{f}, {n}>" for f in flags for n in (1, 2, 4)}


def without_a_card(launch):
    """What replaces the functions of cuda.py that need a card: {name: stand-in}."""
    return dict(
        launch=launch,
        scratch=lambda *wanted: [ghost(n, dtype=dtype) for n, dtype in wanted],
        tensor_map=lambda *arguments: None,
        head_map=lambda *arguments: None,
    )


def variants(capability, monkeypatch):
    """{(file, kernel)} of all that can run, the naive versions included."""
    if capability in (89, 100, 120):
        names = {}
        for file, kernel in launches(capability, monkeypatch):
            names.setdefault(file, set()).add(kernel)
        return names
    both = ["float", "bf16"]
    names = {"matmul": {*matmuls(capability, monkeypatch), "add_partials"}}
    names["matmul"] |= {f"{kernel}<{S}>" for S in both for kernel in ("column_sums_naive", "column_partials")}
    most = {"float": (13, 10), "bf16": (7, 7)}
    kernels = "layernorm_forward", "layernorm_backward"
    names["layernorm"] = {
        f"{kernel}<{S}, {n}>" for S in both for kernel, up in zip(kernels, most[S]) for n in range(1, up + 1)
    } | {"layernorm_backward_reduce"}
    names["layernorm"] |= {f"layernorm_{way}_rows<{S}>" for S in both for way in WAYS}
    heads = [f"{S}, {HP}" for S in both for HP in (64, 128)]
    names["attention"] = {f"attention_forward_flash<{head}>" for head in heads}
    names["attention"] |= {f"attention_forward_tensor<{HS}>" for HS in (64, 128)} | {"attention_softmax"}
    owners = "KEYS", "QUERIES"
    names["attention_backward"] = {f"attention_backward_flash<{head}, {o}>" for head in heads for o in owners}
    names["attention_backward"] |= {f"attention_backward_tensor<{H}, {o}>" for H in (64, 128) for o in owners}
    names["decode"] = {f"attention_decode<{head}>" for head in heads}
    plain = {
        "decode": ["attention_append", "attention_decode_naive"],
        "attention": ["attention_scores", "attention_values"],
        "attention_backward": [f"attention_backward_{kind}" for kind in ("scores", "sums", "prepare")],
        "gelu": [f"{op}{version}" for op in ELEMENTWISE for version in ("_naive", "")],
        "encoder": [f"encoder_{kind}" for kind in ENCODER],
        "classifier": [
            "classifier_naive",
            "classifier_twice",
            "classifier",
            "cross_entropy_naive",
            "cross_entropy",
        ],
        "sample": ["sample_naive", "sample"],
        "gather": ["take_rows_naive", "take_rows"],
    }
    for file, kernels in plain.items():
        names.setdefault(file, set()).update(f"{kernel}<{S}>" for kernel in kernels for S in both)
    names["classifier"].add("weighted_sum")
    names["encoder"] |= {f"encoder_backward<{S}, 16, 4>" for S in both}
    names["encoder"] |= {"token_groups", "encoder_backward_join"}
    if capability == 90:
        names["matmul_hopper"] = hopper_matmuls(monkeypatch)
        names["attention_hopper"] = {f"attention_forward_hopper<{HS}>" for HS in (64, 128)}
        names["attention_hopper"] |= {
            f"attention_backward_hopper<{H}, {o}>" for H in (64, 128) for o in owners
        }
    names["norm"] = {"global_norm_naive", "square_sums", "global_norm_finish", "plan_update"}
    names["adamw"] = {"adamw_naive", "adamw"}
    if capability < 80:  # neither bf16 nor cp.async
        new = re.compile(r"bf16|_tensor<|_skinny<|^classifier<")
        names = {file: {name for name in kernels if not new.search(name)} for file, kernels in names.items()}
    return names


# ------------------------------------------------------------------------------------------------------------
# What cuda.py launches, with how much dynamic shared memory


class Ghost(np.ndarray):
    """Looks like an array on the card: nobody reads or writes it, so it needs no memory."""

    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))
    device = property(lambda self: gpu.DEVICE)


def ghost(*shape, dtype=np.float32):
    return np.empty(shape, dtype).view(Ghost)


def step(S, H=12, C=768, B=16, T=1024, V=50304, R=5336):
    """The operations of a training step as gpt2.py calls them; R rows of logits at once, stored as S."""
    s = lambda *shape: ghost(*shape, dtype=cuda.DTYPES[S])
    f, ints = ghost, lambda *shape: ghost(*shape, dtype=np.int32)
    x, h, qkv, lse, mean = s(B, T, C), s(B, T, 4 * C), s(B, T, 3 * C), f(B, H, T), f(B, T)
    wte, wpe, dwte, dwpe = s(V, C), s(T, C), f(V, C), f(T, C)
    rows, logits = s(R, C), s(R, V)
    cuda.encoder_forward(x, ints(B, T), wte, wpe)
    cuda.layernorm_forward(x, mean, mean, x, s(C), s(C))
    cuda.matmul_forward(qkv, x, s(C, 3 * C), s(3 * C))
    cuda.attention_forward(x, lse, qkv, H)
    cuda.matmul_residual_forward(x, x, s(C, C), s(C), x)
    cuda.matmul_gelu_forward(h, h, x, s(C, 4 * C), s(4 * C))
    cuda.matmul_residual_forward(x, h, s(4 * C, C), s(C), x)
    cuda.matmul_forward(logits, rows, wte.T, None)
    cuda.classifier(f(R), logits, ints(R), f(R), V)
    cuda.weighted_sum(f(1), f(R), f(R))
    cuda.matmul_backward(rows, dwte.T, None, logits, rows, wte.T)
    cuda.layernorm_backward(x, f(C), f(C), x, x, s(C), mean, mean)
    cuda.matmul_gelu_backward(h, f(4 * C, C), f(C), x, h, s(4 * C, C), h)
    cuda.matmul_backward(x, f(C, 4 * C), f(4 * C), h, x, s(C, 4 * C))
    cuda.matmul_backward(x, f(C, C), f(C), x, x, s(C, C))
    cuda.attention_backward(qkv, x, x, lse, qkv, H)
    cuda.matmul_backward(x, f(C, 3 * C), f(3 * C), qkv, x, s(C, 3 * C))
    cuda.encoder_backward(dwte, dwpe, x, ints(B, T))
    cuda.global_norm(f(1), f(1000))
    cuda.plan_update(f(4), ints(1), f(1), f(1), f(4), 0.9, 0.95)
    copy = None if S == "float32" else s(1000)
    cuda.adamw(f(1000), f(1000), f(1000), f(1000), f(4), 0.9, 0.95, 1e-8, 0.1, copy)


def launches(capability, monkeypatch, training_only=False):
    """{(file, kernel): dynamic shared bytes, the most} of d12's training, and of what else asks for some."""
    found = {}

    def launch(file, kernel, grid, block, *arguments, shared=0, overlap=False):
        found[file, kernel] = max(shared, found.get((file, kernel), 0))

    with monkeypatch.context() as patch:
        as_card(capability, patch)
        for name, stand_in in without_a_card(launch).items():
            patch.setattr(cuda, name, stand_in)
        patch.setattr(cuda, "_chunk_count", lambda: ghost(1, dtype=np.int32))
        patch.setattr(gpu, "xp", SimpleNamespace(ndarray=Ghost))
        cuda._slices.cache_clear()  # it knows this card's number of multiprocessors
        step("bfloat16" if capability >= 80 else "float32")
        if not training_only:
            for S, storage in cuda.DTYPES.items():
                if S == "bfloat16" and capability < 80:
                    continue
                step(S)
                for version, HS in itertools.product(("", "portable", "flash"), (64, 128)):
                    patch.setattr(cuda, "KERNEL_OVERRIDES", {"attention": version} if version else {})
                    qkv, out, lse = (
                        ghost(1, 5, 3 * HS, dtype=storage),
                        ghost(1, 5, HS, dtype=storage),
                        ghost(1, 1, 5),
                    )
                    cuda.attention_forward(out, lse, qkv, 1)
                    cuda.attention_backward(qkv, out, out, lse, qkv, 1)
                for C in range(64, 2560, 64):
                    x, w, mean = ghost(5, C, dtype=storage), ghost(C, dtype=storage), ghost(5)
                    cuda.layernorm_backward(x, ghost(C), ghost(C), x, x, w, mean, mean)
                row = ghost(2, (cuda.SHARED - 512) // storage.itemsize // 8 * 8, dtype=storage)  # the longest
                cuda.classifier(ghost(2), row, ghost(2, dtype=np.int32), ghost(2), 9)
    cuda._slices.cache_clear()
    return found


def test_no_kernel_is_forgotten(monkeypatch):
    """Every __global__ function of every .cu file is among the variants."""
    table = variants(90, monkeypatch)
    for path in cuda.HERE.glob("*.cu"):
        kernel = r"__global__ void(?:\s+__launch_bounds__\(.*?\)+(?: *//.*)?)?\s+(\w+)\("
        written = re.findall(kernel, path.read_text())
        assert set(written) == {name.partition("<")[0] for name in table[path.stem]}, path.name


# ------------------------------------------------------------------------------------------------------------
# Compiling


def compiled(file, names, capability, version=13):
    """({kernel: (registers, shared bytes, spilled bytes)}, the log) of some kernels of a file."""
    library, program = nvrtc(version), ctypes.c_void_p()
    code = (cuda.HERE / f"{file}.cu").read_bytes()
    assert library.nvrtcCreateProgram(ctypes.byref(program), code, f"{file}.cu".encode(), 0, None, None) == 0
    for name in names:
        assert library.nvrtcAddNameExpression(program, name.encode()) == 0
    options = [*gpu._options(file), f"-I{toolkit(version)[1]}"]
    options += [] if file.endswith("_hopper") else [f"-arch=sm_{capability}"]
    options += ["-ftz=true", "--device-as-default-execution-space"]  # as CuPy calls it
    options += ["--ptxas-options=-v", "--ptxas-options=-warn-spills"]
    options = [option.encode() for option in options]
    failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    length = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(length))
    buffer = ctypes.create_string_buffer(length.value)
    library.nvrtcGetProgramLog(program, buffer)
    log, found = buffer.value.decode(), {}
    assert not failed, f"{file}.cu for sm_{capability}:\n{log}"
    for name in names:
        lowered = ctypes.c_char_p()
        assert library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(lowered)) == 0
        own = log[log.index(f"entry function '{lowered.value.decode()}'") :].split("Compiling entry", 2)[0]
        numbers = [
            re.search(rf"(\d+) {what}", own) for what in ("bytes spill stores", "registers", "bytes smem")
        ]
        spilled, registers, shared = (int(number[1]) if number else 0 for number in numbers)
        found[name] = registers, shared, spilled
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return found, log


def compile_all(table, capability, version=13):
    """{(file, kernel): (registers, shared bytes, spilled bytes)} and all logs, compiled side by side."""
    jobs = []
    for file, names in table.items():
        jobs += [(file, sorted(names)[i : i + 12]) for i in range(0, len(names), 12)]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda job: compiled(*job, capability, version), jobs))
    rows = {(file, name): row for (file, _), (rows, _) in zip(jobs, done) for name, row in rows.items()}
    return rows, "".join(log for _, log in done)


@pytest.mark.parametrize("capability", CARDS)
def test_every_variant_compiles(capability, monkeypatch):
    rows, log = compile_all(variants(capability, monkeypatch), capability)
    assert not re.search(r"warning|C75\d\d", log, re.IGNORECASE), re.findall(r".*(?:warning|C75).*", log)[:5]
    spilling = {name: row for name, row in rows.items() if row[2]}
    assert not spilling, f"registers are spilled: {spilling}"
    asked = launches(capability, monkeypatch)
    assert not asked.keys() - rows.keys(), "a launch of a variant that is not in the list"
    for (file, name), (_, static, _) in rows.items():
        dynamic = asked.get((file, name), 0)
        if name.startswith("matmul_bf16"):
            BM, BN, BK, _, _, stages = map(int, name.strip(">").split(", ")[-6:])
            assert dynamic in (0, stages * (BM + BN) * BK * 2)
            dynamic = stages * (BM + BN) * BK * 2
        assert static <= 48 * 1024 and static + dynamic <= CARDS[capability][1] * 1024, name
    for name, dynamic in launches(capability, monkeypatch, training_only=True).items():
        registers, static, _ = rows[name]
        TABLE.setdefault(name, {})[capability] = f"{registers:3} {static + dynamic:>7,}"


@pytest.mark.skipif(toolkit(12) is None, reason="the wheel of CUDA 12's NVRTC is not installed")
@pytest.mark.parametrize("capability", [80, 90])
def test_cuda_12_compiles_every_kernel(capability, monkeypatch):
    """A variant of each: all 482 that these cards have take two minutes, and none of them spills either."""
    table = {}
    for file, names in variants(capability, monkeypatch).items():
        one_of_each = {name.partition("<")[0]: name for name in sorted(names)}
        table[file] = set(one_of_each.values())
    rows, log = compile_all(table, capability, version=12)
    assert not re.search(r"warning|C75\d\d", log, re.IGNORECASE), re.findall(r".*(?:warning|C75).*", log)[:5]
    spilling = {name: row for name, row in rows.items() if row[2]}
    assert not spilling, f"registers are spilled: {spilling}"


TABLE = {}  # (file, kernel): {capability: registers and shared memory}, of what training uses


def report():
    """TABLE as lines of text, for the end of a session: conftest.py prints it."""
    cards = sorted({capability for row in TABLE.values() for capability in row})
    head = "registers and shared bytes of d12's training, bf16 (sm_75: float32)"
    lines = [" ".join(f"{f'sm_{card}':>11}" for card in cards) + f"  {head}"]
    for (file, name), row in TABLE.items():
        lines.append(" ".join(f"{row.get(card, ''):>11}" for card in cards) + f"  {file}.cu: {name}")
    return lines if TABLE else []


def main():
    for capability in map(int, sys.argv[1:] or CARDS):
        with pytest.MonkeyPatch.context() as monkeypatch:
            rows, _ = compile_all(variants(capability, monkeypatch), capability)
        print(f"sm_{capability}: {len(rows)} variants\n{'registers':>9} {'shared':>7} {'spilled':>7}  kernel")
        for (file, name), row in rows.items():
            print("{:9} {:7} {:7}".format(*row), f" {file}.cu: {name}")


if __name__ == "__main__":
    main()
