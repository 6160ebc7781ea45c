"""Reference values from another implementation: Hugging Face's GPT2LMHeadModel on PyTorch.

    python tests/golden/make_golden.py                            writes model/ and expected.safetensors
    python tests/golden/make_golden.py --check-transformers DIR   saves here and loads there, and the reverse

Only this script needs torch and transformers (and the check requirements.txt besides); the tests read the
small files that it made. The model is tiny but nothing in it is trivial: biases and layernorm weights are
random too. Its weights are float32; what is expected of them was computed in float64, so every difference is
ours. Read tests/test_golden.py after it.
"""

import argparse
import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers

HERE = Path(__file__).parent
STEPS, B, T = 10, 2, 32
LR = [1e-3 * min(step / 3, 1 - (step - 3) / 10) for step in range(1, STEPS + 1)]  # up, then down


SIZES = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=97, n_positions=T)


def random_model(sizes=SIZES, seed=1, std=0.2):
    """A GPT2LMHeadModel with N(0, std) everywhere, layernorm weights around 1, and no dropout."""
    torch.manual_seed(seed)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    tokens = dict(bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, **tokens))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1 if ".ln_" in name and name.endswith("weight") else 0
            parameter.normal_(mean, std)
    return model


def make():
    model = random_model()
    model.save_pretrained(HERE / "model")
    (HERE / "model" / "generation_config.json").unlink(missing_ok=True)
    model.double()

    batches = torch.randint(0, 97, (STEPS + 1, B, T))  # the last is for the loss after ten steps
    found = {"tokens": batches.int()}
    output = model(batches[0], labels=batches[0])  # shifts the labels itself: T - 1 losses a row
    output.loss.backward()
    found |= {"logits": output.logits, "loss": output.loss[None]}
    for name, parameter in model.named_parameters():
        found["grad." + name.removeprefix("transformer.")] = parameter.grad.clone()

    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for tokens, lr in zip(batches, [*LR, None]):
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        losses.append(loss)
        if lr is None:
            break
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    found |= {"losses": torch.stack(losses), "norms": torch.stack(norms), "lr": torch.tensor(LR).double()}
    found["hellaswag"] = hellaswag_losses(random_model().double())
    exact = ("tokens", "losses", "norms", "lr", "hellaswag")
    found = {n: (t if n in exact else t.float()).detach().contiguous() for n, t in found.items()}
    safetensors.torch.save_file(found, HERE / "expected.safetensors")
    for path in [HERE / "expected.safetensors", *(HERE / "model").iterdir()]:
        path.chmod(0o644)
    print("losses", found["losses"].numpy().round(4))
    print("norms ", found["norms"].numpy().round(4))


def words(text):
    """A tokenizer for 97 tokens: a word with the space before it is one token."""
    return [zlib.crc32(word.encode()) % 97 for word in re.findall(" ?[^ ]+", text)]


def hellaswag_losses(model):
    """(10, 4, 2): sum and mean of the loss of each ending in hellaswag.jsonl, every row by itself."""
    losses = []
    for line in (HERE / "hellaswag.jsonl").read_text().splitlines():
        item = json.loads(line)
        for ending in item["endings"]:
            context, tokens = words(item["ctx"]), words(" " + ending)
            labels = [-100] * len(context) + tokens  # -100: no loss
            loss = model(torch.tensor([context + tokens]), labels=torch.tensor([labels])).loss.item()
            losses.append([loss * len(tokens), loss])
    return torch.tensor(losses, dtype=torch.float64).reshape(-1, 4, 2)


def check(directory):
    """Models of both sides through the files of the other: the same logits, to float32's rounding."""
    sys.path.insert(0, str(HERE.parent.parent))
    import gpt2  # noqa: PLC0415  (only this mode needs the repository)

    print(f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}")
    tokens = np.random.default_rng(2).integers(0, 301, (3, 40))

    def compare(what, ours, theirs):
        a, b = ours.logits(tokens), theirs.eval()(torch.tensor(tokens)).logits.detach().numpy()
        error = np.abs(a - b).max()
        print(f"{what}: logits {a.shape} up to {np.abs(a).max():.2f}, largest difference {error:.2e}")
        if not (a.shape == b.shape and error < 1e-4 * np.abs(b).max()):
            sys.exit("they differ")

    sizes = dict(n_layer=12, n_head=12, n_embd=192, n_positions=64, vocab_size=301)
    ours = gpt2.GPT2(gpt2.GPT2Config(**sizes), seed=3)
    rng = np.random.default_rng(4)
    for parameter in ours.params.values():
        parameter[...] += 0.05 * rng.standard_normal(parameter.shape, np.float32)
    ours.save_pretrained(directory / "ours")
    load = transformers.GPT2LMHeadModel.from_pretrained
    theirs, info = load(directory / "ours", output_loading_info=True)
    print(
        "transformers reports", {name: list(keys) for name, keys in info.items() if keys} or "nothing amiss"
    )
    compare("saved here, loaded there", ours, theirs)

    theirs = random_model(sizes, seed=5, std=0.05)
    for size, what in (("1GB", "saved there, loaded here"), ("1MB", "saved there in pieces, loaded here")):
        theirs.save_pretrained(directory / size, max_shard_size=size)
        print(size, len(list((directory / size).glob("*.safetensors"))), "files")
        compare(what, gpt2.GPT2.from_pretrained(directory / size), theirs)
    for kind in (torch.float16, torch.bfloat16):
        half, place = random_model(sizes, seed=6, std=0.05).to(kind), directory / str(kind)
        half.save_pretrained(place)
        compare(f"saved there in {kind}, loaded here", gpt2.GPT2.from_pretrained(place), half.float())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check-transformers", metavar="DIR", type=Path, help="a directory for the models")
    flags = parser.parse_args()
    if flags.check_transformers:
        check(flags.check_transformers)
    else:
        make()
