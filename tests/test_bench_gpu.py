"""tests/bench_gpu.py under the emulator, so that its first run on a card is no rehearsal; and its report."""

import json
import re
import subprocess
import sys
from pathlib import Path

import bench
import bench_gpu
import bench_ours
import numpy as np
import pytest

import gpt2
from common import UserError

HERE = Path(__file__).parent
CARD = {"card": "NVIDIA H200", "logits": 1 << 28, "versions": {"matmul": ["naive"]}}


def test_runs_in_the_emulator(tmp_path):
    """Every row of every section on our side; the peer's are tested where a Python with torch is named."""
    command = [sys.executable, HERE / "bench_gpu.py", "--emulator", "--out", tmp_path / "results.md"]
    (tmp_path / "results.md").write_text("what was measured before\n## By hand\nremarks\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text, rows = (tmp_path / "results.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert rows.keys() == bench_gpu.SECTIONS.keys()
    assert not [row["work"] for part in rows.values() for row in part if not row["ours"]]
    assert "before" not in text.partition("##")[0] and text.endswith("\n## By hand\nremarks\n")
    assert "failed" not in text + done.stdout + done.stderr and "cannot be shown" not in text
    for line in ("| attention decode ", "| d12, 2 × 32 ", "| 3    |", "| d12 training, thousand tok/s "):
        assert line in text and line in done.stdout
    for work in "attention backward", "encoder backward", "attention decode":
        assert re.search(rf"\| {work}: naive +\| B 2 T 32 ", text), work
    assert re.search(r"\| layernorm backward: rows +\| B 2 T 32 ", text)
    (found,) = rows["steps"][0]["ours"]
    listed = sum(part["seconds"] for part in found["operations"])
    assert 0 < listed < 2 * found["step"]
    labels = {part["label"] for part in found["operations"]}
    assert labels > {"adamw", "matmul_backward 128 to 384", "classifier", "encoder_backward"}
    assert all(part["moved"] > 0 for part in found["operations"])


def test_peers_run_without_a_gpu(tmp_path):
    """Where there is torch, here or in $PEER_PYTHON, each row that has a peer gets an answer of it."""
    python = bench.peer_python(None)
    if not python:
        pytest.skip("there is no torch: set PEER_PYTHON to a Python that has it")
    command = [sys.executable, HERE / "bench_gpu.py", "--emulator", "--out", tmp_path / "results.md"]
    command += ["--peer-python", python, "--only", "matmul,attention,bandwidth,decoding,training,curve"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [row for part in json.loads((tmp_path / "results.json").read_text()).values() for row in part]
    assert not [row["work"] for row in rows if row["peer"] and not row["peers"]]
    assert {line for row in rows for line in row["notes"] if "cuDNN" not in line} == set()


def test_wrong_flags_are_one_line():
    for flags in (["--only", "colour"], ["--write", "--emulator"]):
        with pytest.raises(UserError):
            bench_gpu.main(flags)


def side(script):
    return bench_gpu.Side([sys.executable, "-c", script])


ECHO = """
import sys
for line in sys.stdin:
    if "crash" in line: raise SystemExit("no")
    if "hang" in line: import time; time.sleep(60)
    print("a compiler's note"); print('{"value": 1}', flush=True)
"""


def test_a_side_that_crashes_or_hangs_says_so_and_begins_anew():
    echo = side(ECHO)
    for do, answer in (
        ("time", dict(value=1)),
        ("crash", dict(failed="it ended with status 1: no", lost=True)),
        ("time", dict(value=1)),
        ("hang", dict(failed="no answer within 1 s", lost=True)),
        ("time", dict(value=1)),
    ):
        echo.ask(do=do)
        assert echo.answer(1 if do == "hang" else 30) == answer
    echo.end()


WORKER = """
import bench_gpu
def settle(free):
    if context: raise RuntimeError("illegal address")
def open_row(kind, sizes, version):
    if kind == "wrong": raise AssertionError("wrong: relative error 1")
    if kind == "fault": context.append(1); raise RuntimeError("illegal address")
    return dict(flops=1), {NAMES}
context = []
bench_gpu.serve(open_row, settle)
"""


def test_sides_take_turns_and_a_row_that_fails_costs_only_itself():
    """Ours fails in three ways; after a fault, when the GPU's context is lost, another process goes on."""
    path = f"import sys; sys.path.insert(0, {str(HERE)!r})"
    ours = side(path + WORKER.replace("NAMES", "'ours': lambda: 2"))
    theirs = side(path + WORKER.replace("NAMES", "'cuDNN': lambda: 4, 'flash': lambda: 3"))
    settings = dict(rounds=5, limit=30)
    processes = []
    for kind, why in (
        ("right", []),
        ("wrong", ["AssertionError: wrong: relative error 1"]),
        ("fault", ["RuntimeError: illegal address"]),
        ("right", []),
    ):
        row = bench_gpu.row(kind, peer=kind == "right", M=1)
        result = bench_gpu.compare(row, settings, ours, theirs, 1e9, 1e9)
        assert result["wrong"] == why
        assert result["ours"] == ([] if why else [2] * 5)
        if not why:
            assert bench_gpu.peer(result) == ("flash", 3) and bench_gpu.ratios(result) == (1.5, 1.5, 1.5)
        processes.append(ours.process)
    assert processes[0] is processes[1] and processes[2] is None and processes[3]
    ours.end(), theirs.end()


def test_seconds_are_shared_out():
    """With enough, a section may use all that the later ones do not need; with too little, its part."""
    later = ["training", "curve"]  # need 115
    assert bench_gpu.share("matmul", later, 290) == 175
    assert bench_gpu.share("matmul", later, 100) == pytest.approx(100 * 55 / 170)
    assert bench_gpu.share("curve", [], 3) == 3


def test_costs_of_a_step():
    """FLOP and bytes of operations, as bench.py --profile and the table of a step have them."""
    model = gpt2.GPT2(gpt2.GPT2Config(1, 2, 32, 8, 128))
    model.ops = bench_ours.Timed(model.ops)
    tokens = np.zeros((3, 9), np.int32)
    model.forward(tokens[:, :-1], tokens[:, 1:])
    model.backward()
    flops = model.ops.flops
    assert flops["matmul_forward 32 to 96"] == 2 * 24 * 32 * 96
    assert flops["matmul_gelu_backward 128 to 32"] == 4 * 24 * 32 * 128
    assert flops["attention_forward"] == 2 * 3 * 8 * 8 * 32 and flops["adamw"] == 0
    wte, wpe, out = np.zeros((128, 32)), np.zeros((8, 32)), np.zeros((3, 8, 32))  # float64: 256 bytes a row
    known = dict(tokens=tokens[:, 1:], wte=wte, wpe=wpe, dwte=wte, dwpe=wpe)
    forward = {key: known[key] for key in ("tokens", "wte", "wpe")} | dict(out=out)
    backward = {key: known[key] for key in ("tokens", "dwte", "dwpe")} | dict(dout=out)
    assert bench_ours.cost("encoder_forward", forward)[2] == 24 * 4 + 256 * (24 + 24 + 8)
    assert bench_ours.cost("encoder_backward", backward)[2] == 24 * 4 + 256 * (24 + 2 * 24 + 2 * 8)
    assert (
        bench_ours.cost("classifier", dict(logits=wte, targets=tokens, vocab_size=5))[2] == 256 * 256 + 27 * 4
    )


def measured(kind, work, ours, peers=None, about=None, **sizes):
    row = bench_gpu.row(kind, work, **sizes) | dict(ours=ours, about=about or {}, wrong=[], notes=[])
    return row | dict(peers=peers or {})


def test_report():
    """Rates, shares, ratios and verdicts of made-up measurements."""
    report, about = bench_gpu.Report(CARD), dict(flops=0, moved=4e9, error=1e-3, kernel="k")
    memcpy = {"cudaMemcpyAsync": [2e-3], "torch's copy_": [1e-3]}
    product = about | dict(flops=8e11)
    report.rows["ceilings"] = [
        measured("copy", "copy", [2e-3, 1.6e-3, 2.1e-3], memcpy, about, bytes=1),
        measured("matmul", "matmul", [1e-3], {"torch": [2e-3]}, product, M=1, N=1, K=1),
    ]
    assert report.copy() == (4e12, "torch's copy_") and report.product() == 8e14
    report.rows["matmul"] = [
        measured("matmul", "124M qkv", [1e-3, 1e-3, 2e-3], {"torch": [2e-3, 2e-3, 2e-3]}, product, M=9),
        measured("matmul", "124M proj", [1e-3], {"torch": [5e-4]}, product, M=9),
        measured("matmul_residual", "124M proj + residual", [1.1e-3], {}, product, M=9),
    ]
    text = report.section("matmul")
    assert "| 2.00 | 1.00–2.00 |" in re.sub(" +", " ", text) and "800 TFLOP/s |   81% |" in text
    assert "plain × 1.10" in text
    report.rows["bandwidth"] = [
        measured("gelu_forward", "gelu forward", [2e-3], {}, about, B=1),
        measured("encoder_backward", "encoder backward", [2e-3], {}, about, B=1),
    ]
    report.rows["training"] = [
        measured("training", "d12", [0.1], {"torch": [0.12]}, dict(flops=5e13), B=64, T=1024),
        measured("training", "d12", [0.05], {}, dict(flops=2.5e13), B=32, T=1024),
    ]
    assert "655,360 |           50.5% |" in report.section("training")
    operation = dict(label="gelu", calls=2, seconds=0.5, flops=0, moved=4e11, kernels=[["gelu", 2, 0.5]])
    report.rows["steps"] = [
        measured("steps", "steps", [dict(step=1.0, operations=[operation])], B=64, T=1024)
    ]
    text = re.sub(" +", " ", report.section("steps"))
    assert "| gelu | 2 | 500.00 | 50.0% | 100.00 | 400.00 |" in text and "gaps | | 500.00 | 50.0% |" in text
    report.rows["curve"] = [measured("curve", "curve", [[3.0, 2.0]], {"torch": [[3.0, 2.5]]}, B=1)]
    assert "Apart by 0.2500" in report.section("curve")
    found = {what: value for what, (value, _) in report.found().items()}
    assert found == {
        "124M matmuls, cuBLAS's time over ours, geometric mean": pytest.approx(1),
        "124M matmuls, the least": 0.5,
        "bandwidth kernels, the least share of the copy": 0.5,
        "encoder backward, share of the copy": 0.5,
        "d12 training, thousand tok/s": pytest.approx(655.36),
        "d12 training, tok/s over torch.compile's": pytest.approx(1.2),
    }
    report.rows["matmul"][0]["wrong"].append("broken")
    whole = re.sub(" +", " ", report.whole())
    for line in (
        "| 124M matmuls, the least | 0.5 | ≥ 0.9 | ≥ 0.9 | below | 124M proj |",
        "| d12 training, thousand tok/s | 655.4 | ≥ 580 | ≥ 660 | pass | micro-batch 64 |",
        "| encoder backward, share of the copy | 0.5 | ≥ 0.5 | ≥ 0.5 | aim reached | |",
        "- matmul, 124M qkv : broken",
    ):
        assert line in whole
    report.card = CARD | dict(card="NVIDIA A100")
    assert "| d12 training, thousand tok/s | 655.4 | | | | micro-batch 64 |" in re.sub(
        " +", " ", report.targets()
    )
