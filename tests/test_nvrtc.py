"""NVRTC, the compiler on the user's machine, compiles every kernel that cuda.py can choose; no GPU needed.

For sm_80, 86, 89 and 90: no warning, no spilled register, and what the launch asks for fits the card.

    python tests/test_nvrtc.py        the table: registers, shared memory, spills of every variant

NVRTC is a library of PyPI's (nvidia-cuda-nvrtc, and cuda_bf16.h of nvidia-cuda-runtime), called by ctypes.
"""

import ctypes
import functools
import importlib.util
import itertools
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import card  # noqa: E402

cuda = card.cuda()
gpu = sys.modules[cuda.launch.__module__]
CARDS = {80: (108, 163), 86: (84, 99), 89: (128, 99), 90: (132, 227)}  # multiprocessors, KB for a block


def toolkit():
    """Where the wheels put NVRTC and the headers, or None."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations if spec else ():
        if list(Path(place).glob("cu13/lib/libnvrtc.so*")):
            return Path(place) / "cu13"
    return None


pytestmark = pytest.mark.skipif(toolkit() is None, reason="NVRTC's wheels are not installed")


@functools.cache
def nvrtc():
    libraries = sorted(
        (toolkit() / "lib").glob("libnvrtc*.so*")
    )  # -builtins first, which the other looks for
    found = [ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in libraries if ".alt." not in path.name]
    return found[-1]


# ------------------------------------------------------------------------------------------------------------
# What cuda.py can choose

ELEMENTWISE = "gelu_forward", "gelu_backward", "residual_forward"
ENCODER = "forward_naive", "forward", "backward_naive", "backward_wpe", "backward_wte", "backward_join"
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


def matmuls(capability, monkeypatch):
    """Every use with every tile that _tile gives for some size on this card."""
    for name, value in zip(("SMS", "SHARED"), (CARDS[capability][0], CARDS[capability][1] * 1024)):
        monkeypatch.setattr(cuda, name, value)
    sizes = list(itertools.product((1, 16, 256, 768, 1 << 16), repeat=3))
    for S, packed, (epilogue, a_t, b_t, wide) in itertools.product(("float", "bf16"), (True, False), USES):
        flags = ", ".join(str(flag).lower() for flag in (a_t, b_t, packed))
        for tile in sorted({cuda._tile(S, *mnk, packed, a_t) for mnk in sizes}):
            variant = f"{epilogue}, {flags}, {', '.join(map(str, tile))}>"
            out = "float" if wide else "bf16"
            yield f"matmul_float<{variant}" if S == "float" else f"matmul_bf16<{out}, {variant}"


def variants(capability, monkeypatch):
    """{(file, kernel)} of all that can run, the naive rungs included."""
    both = ["float", "bf16"]
    names = {"matmul": {*matmuls(capability, monkeypatch), "add_partials"}}
    names["matmul"] |= {f"column_partials<{S}, {packed}>" for S in both for packed in ("true", "false")}
    flags = ("false, false", "false, true", "true, false")
    names["matmul"] |= {f"matmul_naive<{S}, {flag}>" for S in both for flag in flags}
    most = {"float": (13, 13, 10), "bf16": (7, 7, 7)}
    kernels = "layernorm_forward", "residual_layernorm_forward", "layernorm_backward"
    names["layernorm"] = {
        f"{kernel}<{S}, {n}>" for S in both for kernel, up in zip(kernels, most[S]) for n in range(1, up + 1)
    } | {"layernorm_backward_reduce"}
    names["layernorm"] |= {
        f"layernorm_{kind}<{S}>" for S in both for kind in ("forward_naive", "forward_rows", "backward_rows")
    }
    heads = [f"{S}, {HP}" for S in both for HP in (64, 128)]
    names["attention"] = {f"attention_forward_flash<{head}>" for head in heads}
    names["attention"] |= {f"attention_forward_tensor<{HS}>" for HS in (64, 128)} | {"attention_softmax"}
    owners = "keys", "queries"
    names["attention_backward"] = {f"attention_backward_{o}_flash<{head}>" for head in heads for o in owners}
    names["attention_backward"] |= {f"attention_backward_{o}_tensor<{H}>" for H in (64, 128) for o in owners}
    names["attention_backward"] |= {f"attention_backward_prepare<{S}>" for S in both}
    names["decode"] = {
        f"attention_decode<{head}, {w}>" for head in heads for w in (1, 4 if "float" in head else 8)
    }
    plain = {
        "decode": ["attention_append", "attention_decode_combine"],
        "attention": ["attention_scores", "attention_values"],
        "gelu": [f"{op}{rung}" for op in ELEMENTWISE for rung in ("_naive", "")],
        "encoder": [f"encoder_{kind}" for kind in ENCODER],
        "classifier": ["classifier_naive", "classifier_twice", "classifier", "cross_entropy"],
        "sample": ["sample_naive", "sample"],
        "gather": ["take_rows"],
    }
    for file, kernels in plain.items():
        names.setdefault(file, set()).update(f"{kernel}<{S}>" for kernel in kernels for S in both)
    names["encoder"] |= {"token_count", "token_starts", "token_scatter", "token_order"}
    names["norm"] = {"global_norm_naive", "square_sums", "global_norm_finish", "clip_scale"}
    names["adamw"] = {"adamw_naive", "adamw"}
    return names


def test_no_kernel_is_forgotten(monkeypatch):
    """Every __global__ function of every .cu file is among the variants."""
    table = variants(90, monkeypatch)
    for path in cuda.HERE.glob("*.cu"):
        kernel = r"__global__ void(?:\s+__launch_bounds__\(.*?\)(?: *//.*)?)?\s+(\w+)\("
        written = re.findall(kernel, path.read_text())
        assert set(written) == {name.partition("<")[0] for name in table[path.stem]}, path.name


# ------------------------------------------------------------------------------------------------------------
# Compiling


def compiled(file, names, capability):
    """({kernel: (registers, shared bytes, spilled bytes)}, the log) of some kernels of a file."""
    library, program = nvrtc(), ctypes.c_void_p()
    code = (cuda.HERE / f"{file}.cu").read_bytes()
    assert library.nvrtcCreateProgram(ctypes.byref(program), code, f"{file}.cu".encode(), 0, None, None) == 0
    for name in names:
        assert library.nvrtcAddNameExpression(program, name.encode()) == 0
    options = [*gpu._options(), f"-I{toolkit() / 'include'}", f"-arch=sm_{capability}"]
    options += ["-ftz=true", "--device-as-default-execution-space"]  # as CuPy calls it
    options += ["--ptxas-options=-v", "--ptxas-options=-warn-spills"]
    options.append("--diag-suppress=177")  # a constant without use: another kernel of the file uses it
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


def compile_all(capability, monkeypatch):
    """{(file, kernel): (registers, shared bytes, spilled bytes)} and all logs, compiled side by side."""
    jobs = []
    for file, names in variants(capability, monkeypatch).items():
        jobs += [(file, sorted(names)[i : i + 12]) for i in range(0, len(names), 12)]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda job: compiled(*job, capability), jobs))
    rows = {(file, name): row for (file, _), (rows, _) in zip(jobs, done) for name, row in rows.items()}
    return rows, "".join(log for _, log in done)


@pytest.mark.parametrize("capability", CARDS)
def test_every_variant_compiles(capability, monkeypatch):
    rows, log = compile_all(capability, monkeypatch)
    assert "warning" not in log.lower(), re.findall(r".*warning.*", log, re.IGNORECASE)[:5]
    spilling = {name: row for name, row in rows.items() if row[2]}
    assert not spilling, f"registers are spilled: {spilling}"
    assert max(shared for _, shared, _ in rows.values()) <= 48 * 1024


def main():
    for capability in map(int, sys.argv[1:] or CARDS):
        with pytest.MonkeyPatch.context() as monkeypatch:
            rows, _ = compile_all(capability, monkeypatch)
        print(f"sm_{capability}: {len(rows)} variants\n{'registers':>9} {'shared':>7} {'spilled':>7}  kernel")
        for (file, name), row in rows.items():
            print("{:9} {:7} {:7}".format(*row), f" {file}.cu: {name}")


if __name__ == "__main__":
    main()
