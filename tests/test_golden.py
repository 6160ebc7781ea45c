"""Our GPT-2 against Hugging Face's, on PyTorch, by the values that golden/make_golden.py wrote down.

The weights come out of files in Hugging Face's format, as a user's would.
"""

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import evaluate
import gpt2

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def expected():
    return safetensors.numpy.load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(params=["float32", "float64"])
def model(request):
    return gpt2.GPT2.from_pretrained(GOLDEN / "model", dtype=request.param)


def test_the_model_is_read_whole(model):
    assert model.config == gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=97)
    for name, value in safetensors.numpy.load_file(GOLDEN / "model" / "model.safetensors").items():
        np.testing.assert_array_equal(model.params[name.removeprefix("transformer.")], value)
        assert np.abs(value).max() > 0


def test_logits(model, expected):
    logits = model.logits(expected["tokens"][0])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)  # the issue asks for 1e-4
    last = model.decode(expected["tokens"][0], model.new_cache(2, 32))
    np.testing.assert_allclose(last, expected["logits"][:, -1], rtol=0, atol=1e-5)


class Words:
    """The tokenizer that make_golden.py has for HellaSwag: a word with the space before it is a token."""

    def encode(self, text):
        return [zlib.crc32(word.encode()) % 97 for word in re.findall(" ?[^ ]+", text)]


def test_hellaswag(model, expected):
    items = evaluate.read_hellaswag(GOLDEN / "hellaswag.jsonl", Words(), model.config.n_positions)
    losses = evaluate.ending_losses(model, items)  # (10, 4)
    np.testing.assert_allclose(losses, expected["hellaswag"][:, :, 0], rtol=1e-5)
    labels = [label for _, _, label in items]
    acc, acc_norm = ((expected["hellaswag"][:, :, i].argmin(1) == labels).mean() for i in (0, 1))
    results = evaluate.hellaswag(model, items)
    assert (results["acc"], results["acc_norm"], results["n"]) == (acc, acc_norm, 10)
    assert acc != acc_norm, "the mean decides otherwise than the sum"


def test_loss_and_every_gradient(model, expected):
    tokens = expected["tokens"][0]
    loss = model.forward(tokens[:, :-1], tokens[:, 1:])
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
    model.backward()
    names = {name.removeprefix("grad.") for name in expected if name.startswith("grad.")}
    assert names == set(model.grads)
    for name in names:
        wanted = expected["grad." + name]
        error = np.abs(model.grads[name] - wanted).max()
        assert error <= 1e-5 * np.abs(wanted).max(), f"{name}: off by {error}"  # the issue asks for 1e-4


def test_ten_steps_of_adamw(model, expected):
    optimizer = gpt2.AdamW(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    for tokens, lr in zip(expected["tokens"], [*expected["lr"], None]):
        losses.append(model.forward(tokens[:, :-1], tokens[:, 1:])[0])
        if lr is not None:
            model.backward()
            norms.append(optimizer.step(lr, max_norm=1.0)[0])
    np.testing.assert_allclose(losses, expected["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norms, expected["norms"], rtol=1e-5)
