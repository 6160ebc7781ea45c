"""FineWeb and checkpoints from the hub, by the real client, through a socket, from a hub that also fails."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fake_hub
import numpy as np
import pytest
import script

import data
import evaluate
import gpt2
import hub
import rl
import sample
import sft
import train
from common import UserError
from tokenizer import Tokenizer

pytest.importorskip("huggingface_hub", reason="requirements-hub.txt is not installed")

ROOT = Path(data.__file__).parent
REPOSITORY, STEM = data.HUB["fineweb"]
VAL = f"{STEM}_val_000000.bin"


def train_shard(k):
    return f"{STEM}_train_{k:06d}.bin"


def shard(n, seed):
    """The bytes of a shard of n tokens of GPT-2's vocabulary."""
    header = np.zeros(256, "<i4")
    header[:3] = data.MAGIC, data.VERSION, n
    tokens = (np.arange(n, dtype=np.int32) * 7919 + seed) % 50257
    return header.tobytes() + tokens.astype("<u2").tobytes()


SHARDS = {VAL: shard(700, 0)} | {train_shard(k): shard(900 + k, k) for k in range(1, 8)}


@pytest.fixture(scope="module", autouse=True)
def _vocabulary():
    """GPT-2's is here before a test looks at what data.py says: who fetches it says so."""
    Tokenizer.gpt2()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub with a few small shards of FineWeb; we are patient for 0.3 seconds."""
    with fake_hub.FakeHub() as server:
        server.repositories[f"datasets/{REPOSITORY}"] = {"README.md": b"# FineWeb", **SHARDS}
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr("hub.PATIENCE", 0.3)
        monkeypatch.setattr("hub.PAUSE", 0.1)
        monkeypatch.chdir(tmp_path)
        yield server


def fineweb(*flags, shards=3):
    """Run `data.py fineweb` here; the shards are in fw/."""
    return script.run(data.main, "fineweb", "--out", "fw", "--shards", shards, *flags)


def assert_whole(*names):
    for name in names:
        assert Path("fw", name).read_bytes() == SHARDS[name], name
    assert not list(Path("fw").glob(".*.part"))


# ------------------------------------------------------------------------------------------------------------
# Shards


def test_shards_arrive_in_the_order_of_the_first_epoch(server, monkeypatch):
    monkeypatch.setattr("hub.AT_ONCE", 1)
    done = fineweb("--all", "--seed", 7, shards=7)
    assert done.status == 0 and "fw: 8 files" in done.out, done
    assert_whole(*SHARDS)
    windows = train.Windows(data.shards("fw", "train"), 10, seed=7)
    walked = [Path(windows.locate(i)[0].filename).name for i in range(windows.n_windows)]
    asked = [name for name, _ in server.requests if name.endswith(".bin")]
    assert asked == [VAL, *dict.fromkeys(walked)]
    assert data.meta("fw")["sources"] == [
        {"repository": REPOSITORY, "revision": fake_hub.COMMIT, "license": "ODC-By 1.0"}
    ]
    assert Tokenizer.load("fw").vocab_size == data.meta("fw")["vocab_size"] == 50257
    server.requests.clear()
    assert fineweb("--all", shards=7).status == 0 and not server.requests, "what is there needs no hub"
    assert fineweb("--all", shards=2).status == 0
    assert len(data.shards("fw", "train")) == 2, "meta.json says what is used"
    assert [name for name, _ in server.requests if name.endswith(".bin")] == []


def test_faults_that_pass(server):
    """Every file has one, and the list several."""
    server.faults["revision"], server.faults["tree"] = [429, 503, 500], [503]
    faults = "cut", "reset", "slow", "short", "wrong", "whole", 429, 503
    for name, fault in zip(SHARDS, faults, strict=True):
        server.faults[name] = [fault]
    assert fineweb("--all", shards=7).status == 0
    assert_whole(*SHARDS)
    assert not any(server.faults.values())


@pytest.mark.parametrize(
    ("name", "faults", "words"),
    [
        ("revision", [503] * 99, ["answers 503 since 0.", "run the same command later to go on"]),
        ("revision", [429] * 99, ["answers 429 since 0."]),
        ("revision", [404], [REPOSITORY, "does not exist"]),
        ("revision", [401], [REPOSITORY, "not for everyone"]),
        ("revision", [400], ["answers 400"]),
        (VAL, [503] * 99, [VAL, "answers 503 since 0."]),
        (VAL, [404], [VAL, "does not exist"]),
        (VAL, ["wrong", "wrong"], [VAL, "twice had other bytes"]),
        (VAL, ["short", "short"], [VAL, "twice had other bytes"]),
        (VAL, ["reset"] * 99, [VAL, "there is no connection", "since 0."]),
    ],
)
def test_faults_that_stay(server, name, faults, words):
    server.faults[name] = faults
    assert script.refused(fineweb("--all"), *words)
    assert not Path("fw", VAL).exists()


def test_after_a_failure_the_same_command_goes_on(server):
    server.faults[train_shard(2)] = [404]
    assert script.refused(fineweb("--all"), train_shard(2))
    assert fineweb("--all").status == 0
    assert_whole(VAL, *map(train_shard, (1, 2, 3)))


def test_what_the_hub_does_not_have(server):
    assert script.refused(fineweb(shards=8), f"no {train_shard(8)}; lower --shards 8")
    server.repositories.clear()
    assert script.refused(fineweb(), REPOSITORY, "does not exist")
    assert not list(Path().iterdir())


def test_no_hub_at_all(server, monkeypatch):
    """The status tells the Makefile to train on something else."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = fineweb()
    assert done.status == 69 and done.err.count("\n") == 1 and "no connection to http://127" in done.err, done
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.faults["revision"] = ["html"]
    done = fineweb()
    assert done.status == 69 and "does not answer as the hub does" in done.err, done
    assert not list(Path().iterdir())


def test_no_client(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert script.refused(fineweb(), "python -m pip install -r requirements-hub.txt")


def test_other_data_and_a_full_disk_are_refused(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=4000))
        assert script.refused(fineweb(), "free there; lower --shards 3")
        assert not list(Path("fw").glob("*.bin"))
    assert fineweb("--all", shards=1).status == 0
    edu = script.run(data.main, "fineweb-edu", "--out", "fw")
    assert script.refused(edu, "fw holds other data than fineweb-edu")
    Path("other").mkdir()
    Path("other/a.txt").write_text("mine")
    assert script.refused(script.run(data.main, "fineweb", "--out", "other"), "other exists already")


def test_a_shard_that_was_damaged_later(server):
    """A truncated one is found by its size and fetched again; one of another kind is refused by name."""
    assert fineweb("--all").status == 0
    os.truncate(Path("fw", train_shard(2)), 1500)
    with pytest.raises(UserError, match=f"{train_shard(2)} is truncated"):
        data.shards("fw", "train")
    assert fineweb("--all").status == 0
    assert_whole(train_shard(2))
    shards = data.shards("fw", "train")
    train.check_tokens(shards, 50257)
    with pytest.raises(
        UserError, match=rf"{STEM}_train_00000\d.bin has token \d+, but the vocabulary ends at 265"
    ):
        train.check_tokens(shards, 266)


# ------------------------------------------------------------------------------------------------------------
# The background, and a process that is killed


@pytest.fixture
def large_shard(server):
    """A file of which the client writes some before it has all: it does so by 10 MiB."""
    content = shard(11 << 20, 1)  # 22 MiB
    server.repositories[f"datasets/{REPOSITORY}"] |= {train_shard(1): content, VAL: SHARDS[VAL]}
    return content


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_in_the_middle_and_run_again(server, large_shard):
    """What a killed process had is not fetched again, and two commands do not get in each other's way."""
    server.faults[train_shard(1)] = ["stall"]
    command = [sys.executable, ROOT / "data.py", "fineweb", "--out", "fw", "--shards", "1", "--all"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    part = Path("fw", f".{train_shard(1)}.part")
    wait_until(lambda: part.exists() and part.stat().st_size >= 10 << 20)
    assert data.is_downloading("fw")
    second = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    time.sleep(0.5)
    assert server.asked(train_shard(1)) == [0] and second.poll() is None
    first.kill()
    assert second.wait(20) == 0
    assert server.asked(train_shard(1)) == [0, 10 << 20]
    assert Path("fw", train_shard(1)).read_bytes() == large_shard and not part.exists()
    first.wait()


def test_a_connection_that_is_cut_goes_on_where_it_was(server, large_shard):
    server.faults[train_shard(1)] = ["cut", "reset", "whole"]
    assert fineweb("--all", shards=1).status == 0
    assert server.asked(train_shard(1)) == [0, 10 << 20, 10 << 20]
    assert Path("fw", train_shard(1)).read_bytes() == large_shard


def test_the_rest_arrives_in_the_background(server):
    """Training begins with two files; lengths are known, and the loader gives what it would give later."""
    first, *later = data.in_order_of_need(dict.fromkeys(SHARDS), 42)[1:]
    for name in later:
        server.faults[name] = ["stall"]
    done = fineweb(shards=7)
    assert done.status == 0 and "6 of them arrive in the background, see fw/download.log" in done.out, done
    assert_whole(VAL, first)
    shards = data.shards("fw", "train")
    assert [len(shard) for shard in shards] == [901, 902, 903, 904, 905, 906, 907]
    assert sum(isinstance(shard, data.LateShard) for shard in shards) == 6
    train.check_tokens(shards, 50257)

    sizes = dict(seq_len=10, short_len=10, short_part=0.0, steps=10, total_batch_tokens=200, batch_size=20)
    flags = SimpleNamespace(**sizes, seed=42, overfit_batch=False)
    world = SimpleNamespace(rank=0, size=1, asked_to_stop=0)
    loader = train.DataLoader(shards, flags)
    steps = [next(loader.micro_batches(step, world))[0] for step in range(4)]  # of the first shard
    world.asked_to_stop = int(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        next(loader.micro_batches(6, world))
    assert stopped.value.code == 143
    world.asked_to_stop = 0

    assert fineweb(shards=7).status == 0, "another command leaves the process at work alone"
    server.go_on.set()
    steps += [next(loader.micro_batches(step, world))[0] for step in range(4, 30)]  # waits
    wait_until(lambda: not data.is_downloading("fw"))
    assert_whole(*SHARDS)
    assert "downloading" in Path("fw/download.log").read_text()
    again = train.DataLoader(data.shards("fw", "train"), flags)
    for step, tokens in enumerate(steps):
        np.testing.assert_array_equal(next(again.micro_batches(step, world))[0], tokens)


def test_a_shard_that_will_not_come(server):
    """The process in the background fails: its log says why, the loader says where, the command goes on."""
    late = data.in_order_of_need({VAL: 0, train_shard(1): 0, train_shard(2): 0}, 42)[2]
    server.faults[late] = [404]
    assert fineweb(shards=2).status == 0
    (shard,) = [shard for shard in data.shards("fw", "train") if isinstance(shard, data.LateShard)]
    with pytest.raises(UserError) as raised:
        shard.wait(SimpleNamespace(rank=0, size=1, asked_to_stop=0))
    message = str(raised.value)
    assert f"fw/{late} is not here" in message and "fw/download.log" in message and "\n" not in message
    assert "does not exist" in Path("fw/download.log").read_text()
    command = shlex.split(message.split("python ")[1])
    assert script.run(data.main, *command[1:], "--all").status == 0
    assert_whole(late)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints by name, and a vocabulary that is larger than its tokenizer

NAME = "someone/gpt2-mini"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, but for GPT-2's vocabulary."""
    kept, place = hub.cache(), tmp_path / "cache"
    place.mkdir()
    for path in kept.iterdir():
        if path.is_file():
            (place / path.name).symlink_to(path.resolve())
    monkeypatch.setenv("HANDMADE_CACHE", str(place))
    return place


def upload(server, vocab_size):
    """Put a small GPT-2 on the hub, in the files that openai-community/gpt2 has, and others; return it."""
    sizes = dict(n_layer=1, n_head=2, n_embd=8, n_positions=128)
    model = gpt2.GPT2(gpt2.GPT2Config(**sizes, vocab_size=vocab_size))
    model.save_pretrained("saved")
    vocabulary = {"model": {"type": "BPE", "vocab": {"Ġgazed": 50255}}}
    files = {path.name: path.read_bytes() for path in Path("saved").iterdir()}
    files |= {"tokenizer.json": json.dumps(vocabulary).encode(), "vocab.json": b"{}", "merges.txt": b"#"}
    files |= {"pytorch_model.bin": b"no", "onnx/model.safetensors": b"no", "README.md": b"GPT-2 mini"}
    server.repositories[f"models/{NAME}"] = files
    return model


def test_a_checkpoint_by_name_is_fetched_once(server, cache, monkeypatch, capsys):
    model = upload(server, 50257)
    server.faults["config.json"], server.faults["model.safetensors"] = ["wrong"], ["wrong", "cut"]
    loaded = gpt2.GPT2.from_pretrained(NAME)
    np.testing.assert_array_equal(loaded.flat_params, model.flat_params)
    wanted = ["config.json", "merges.txt", "model.safetensors", "tokenizer.json", "vocab.json"]
    assert sorted(path.name for path in (cache / NAME).glob("*.*")) == wanted
    assert server.requests[-1][0] == "config.json", "what makes it a checkpoint comes last"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # offline
    place = hub.find_checkpoint(NAME)
    assert Tokenizer.load(place).vocab_size == 50257
    sample.main([NAME, "--prompt", "Hello", "--max-tokens", "3"])
    assert capsys.readouterr().out.startswith("Hello")


def test_training_begins_with_a_checkpoint_by_name(server, cache):
    upload(server, 50257)
    fineweb("--all", shards=1)
    flags = "--data fw --out run --steps 1 --seq-len 16 --total-batch-tokens 32 --eval-tokens 64"
    done = script.run(train.main, *flags.split(), "--init-from", NAME, "--device", "cpu")
    assert done.status == 0 and hub.find_checkpoint("run").name == "step_000001", done


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs/gpt2", "is no checkpoint and has none"),
        ("here/gpt2", "is no checkpoint and has none"),
        ("a/b/c", "is no checkpoint and has none"),
        ("someone/nothing", "someone/nothing does not exist"),
        ("someone/llama", "has no config.json and model.safetensors"),
    ],
)
def test_names_of_the_hub_and_others(server, cache, name, words):
    """One line, and the hub is asked only for what may be a name of its."""
    Path("here").mkdir()
    server.repositories["models/someone/llama"] = {"config.json": b"{}", "consolidated.pth": b""}
    with pytest.raises(UserError, match=words) as raised:
        hub.find_checkpoint(name)
    assert "\n" not in str(raised.value)
    assert bool(server.requests) == name.startswith("someone/")


def test_a_checkpoint_that_came_half_is_none(server, cache):
    model = upload(server, 50257)
    server.faults["vocab.json"] = [404]
    with pytest.raises(UserError, match=r"vocab.json does not exist"):
        gpt2.GPT2.from_pretrained(NAME)
    assert not (cache / NAME / "config.json").exists()
    np.testing.assert_array_equal(gpt2.GPT2.from_pretrained(NAME).flat_params, model.flat_params)


def test_rows_that_no_token_has_are_left_out(server, cache):
    """50304 rows, as nanoGPT writes them; the nine tokens of a chat are new ones."""
    rows = upload(server, 50304).params["wte.weight"]
    plain = gpt2.GPT2.from_pretrained(NAME, own_tokens=50257)
    np.testing.assert_array_equal(plain.params["wte.weight"], rows[:50257])
    assert gpt2.GPT2.from_pretrained(NAME).config.vocab_size == 50304
    assert gpt2.GPT2.from_pretrained(NAME, own_tokens=266).config.vocab_size == 50304  # another's tokenizer
    flags = "--out sft --data sums --examples 4 --batch-size 4 --eval-every 0 --exam-every 0 --lr 1e-30"
    assert script.run(sft.main, "--init-from", NAME, *flags.split(), "--device", "cpu").status == 0
    chat = gpt2.GPT2.from_pretrained(hub.find_checkpoint("sft")).params["wte.weight"]
    np.testing.assert_array_equal(chat[:50257], rows[:50257])
    np.testing.assert_array_equal(
        chat[50257:], np.tile(rows[:50257].mean(0, np.float64), (9, 1)).astype("f4")
    )


def test_every_script_works_on_a_padded_vocabulary(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = dict(n_layer=1, n_head=2, n_embd=8, n_positions=512)
    gpt2.GPT2(gpt2.GPT2Config(**sizes, vocab_size=320)).save_pretrained("padded")
    Tokenizer.bytes().save("padded")  # 266 tokens
    sample.main(["padded", "--prompt", "Hello", "--max-tokens", "3"])
    assert capsys.readouterr().out.startswith("Hello")
    problems = ["--task", "arithmetic", "--level", "1", "--max-tokens", "4"]
    evaluate.main(["padded", *problems, "--problems", "1", "--k", "1"])
    short = ["--prompts", "1", "--attempts", "2", "--steps", "1", "--eval-every", "0"]
    rl.main(["--init-from", "padded", "--out", "rl", *problems, *short])
    sft.main(
        ["--init-from", "padded", "--out", "sft", "--data", "sums", "--examples", "16", "--exam-every", "0"]
    )
    for run in ("rl", "sft"):
        assert gpt2.read_config(hub.find_checkpoint(run)).vocab_size == 266
