"""The Makefile on machines that this one is not: with a GPU and its driver, without, and without the hub."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEADER = "| NVIDIA-SMI {0}.10      {1}Driver Version: {0}.10      CUDA {2}Version: {3}     |"
PYTHON = """#!/bin/sh
echo "$*" >>said
case "$*" in *--choose*) echo $CHOOSE ;; data.py\\ fineweb*) exit $HUB ;; esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A directory with the Makefile, whose .venv is ready; Python writes down what it is asked to do."""
    for path in [ROOT / "Makefile", *ROOT.glob("requirements*.txt")]:
        shutil.copy2(path, tmp_path)
    for name in (".venv/bin", "shards/factbook", "commands"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("sh", "cat", "sed", "make", "echo", "mkdir", "ls", "touch"):
        (tmp_path / "commands" / name).symlink_to(shutil.which(name))
    script(tmp_path / ".venv/bin/python", PYTHON)
    (tmp_path / ".venv/ready").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "DATA", "RUN", "MAKEFLAGS", "MAKELEVEL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def script(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def nvidia_smi(machine, *header):
    text = HEADER.format(*header) if header else "NVIDIA-SMI has failed"
    script(machine / "commands/nvidia-smi", f"#!/bin/sh\necho '{text}'\nexit {0 if header else 9}\n")


def make(machine, *arguments, choose="d12", hub=0):
    """(exit status, what make said, what Python was asked to do)."""
    environment = os.environ | {"PATH": str(machine / "commands"), "CHOOSE": choose, "HUB": str(hub)}
    said = machine / "said"
    said.unlink(missing_ok=True)
    done = subprocess.run(["make", *arguments], capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr, said.read_text().splitlines() if said.exists() else []


@pytest.mark.parametrize(
    ("header", "file", "words"),
    [
        (
            ("525", "", "", "12.0"),
            "requirements-cuda12.txt",
            "CuPy for CUDA 12, because the driver is from CUDA 12.0",
        ),
        (("570", "", "", "12.8"), "requirements-cuda12.txt", "the driver is from CUDA 12.8"),
        (
            ("580", "", "", "13.0"),
            "requirements-cuda.txt",
            "CuPy for CUDA 13, because the driver can run CUDA 13.0",
        ),
        (("590", "KMD ", "UMD ", "13.1"), "requirements-cuda.txt", "the driver can run CUDA 13.1"),
        (("520", "", "", "11.8"), None, "can run CUDA 11.8, 12.0 is the oldest we know; update the driver"),
        ((), None, "nvidia-smi finds no working driver; going on without a GPU"),
    ],
)
def test_cupy_goes_with_the_driver(machine, header, file, words):
    nvidia_smi(machine, *header)
    status, said, asked = make(machine, "driver")
    assert (status == 0) == (file is not None or not header) and words in said
    installed = [f"-m pip install -q --disable-pip-version-check -r {file} -r requirements-hub.txt"]
    assert asked == (installed if file else [])


def test_without_a_gpu_make_train_is_the_laptops(machine):
    tiny = ["train.py --out runs/factbook"]
    assert make(machine, "train") == (0, ".venv/bin/python train.py --out runs/factbook  \n", tiny)
    Path("runs/factbook/step_000010").mkdir(parents=True)
    assert make(machine, "train", "ARGS=--lr 1")[2] == ["train.py --out runs/factbook --resume --lr 1"]


def test_with_a_gpu_train_py_chooses_and_the_choice_stays(machine):
    nvidia_smi(machine, "580", "", "", "13.0")
    data = "data.py fineweb --out shards/fineweb"
    d12 = "train.py --model d12 --data shards/fineweb --out runs/d12"
    status, _, asked = make(machine, "train")
    assert (status, asked) == (0, ["train.py --choose", data, d12])
    Path("runs/d12/step_000010").mkdir(parents=True)
    assert make(machine, "train", "ARGS=--hours 1")[2] == [data, d12 + " --resume --hours 1"]
    assert make(machine, "sample")[2] == ["sample.py runs/d12"]
    assert make(machine, "chat")[2] == ["sample.py runs/sft-d12 --chat"], "the assistant of another model"
    assert make(machine, "chat", "MODEL=tiny")[2] == ["sample.py runs/sft --chat"]
    edu = [
        "data.py fineweb-edu --out shards/fineweb-edu",
        "train.py --model d24 --data shards/fineweb-edu --out x",
    ]
    assert make(machine, "train", "MODEL=d24", "DATA=fineweb-edu", "RUN=x")[2] == edu
    assert make(machine, "train", "MODEL=tiny")[2] == ["train.py --out runs/factbook"]


def test_a_small_card_trains_tiny_and_is_asked_again(machine):
    nvidia_smi(machine, "580", "", "", "13.0")
    for _ in range(2):
        assert make(machine, "train", choose="tiny")[2] == [
            "train.py --choose",
            "train.py --out runs/factbook",
        ]


def test_without_the_hub_the_factbook_is_there(machine):
    nvidia_smi(machine, "580", "", "", "13.0")
    data = "data.py fineweb --out shards/fineweb"
    status, said, asked = make(machine, "train", "MODEL=d12", hub=69)
    assert status == 0 and "training the tiny model on the World Factbook instead" in said
    assert asked == [data, "train.py --out runs/factbook"]
    assert make(machine, "sample")[2] == ["sample.py runs/factbook"], "what was chosen was not trained"
    status, said, asked = make(machine, "train", "MODEL=d12", hub=2)
    assert status == 2 and asked == [data], "any other failure is one"
