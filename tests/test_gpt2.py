"""The whole model: its gradient, its cache, its optimizer, its files. Read beside gpt2.py.

Small models in float64 wherever derivatives are measured; the operations themselves are test_kernels.py's.
"""

import errno
import json
import math
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import gpt2
from common import UserError
from gpt2 import GPT2, AdamW, GPT2Config
from kernels import threads as pool

SMALL = dict(n_layer=2, n_head=2, n_embd=10, n_positions=16, vocab_size=23)


def random_model(dtype="float32", recompute=False, **sizes):
    """Nothing is zero or one: biases and layernorm weights are random as well."""
    model = GPT2(GPT2Config(**{**SMALL, **sizes}), dtype=dtype, recompute=recompute)
    rng = np.random.default_rng(1)
    for name, parameter in model.params.items():
        model.set(name, parameter + 0.3 * rng.standard_normal(parameter.shape))
    return model


def batch(model, B=3, T=9, seed=2):
    """Tokens and targets (B, T)."""
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (B, T + 1))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model):
    return {name: gradient.copy() for name, gradient in model.grads.items()}


def assert_same(actual, wanted, **tolerance):
    for name in wanted:
        np.testing.assert_allclose(actual[name], wanted[name], err_msg=name, **tolerance)


# ------------------------------------------------------------------------------------------------------------
# Forward and backward


def token_weights(kind, B, T):
    rng = np.random.default_rng(3)
    return {
        "pretraining": np.full((B, T), 1 / (B * T)),
        "a mask": rng.integers(0, 2, (B, T)) / 7,
        "advantages": rng.standard_normal((B, T)) * rng.integers(0, 2, (B, T)),
    }[kind]


@pytest.mark.parametrize("rows, recompute", [(1000, False), (7, False), (7, True)])
@pytest.mark.parametrize("kind", ["pretraining", "a mask", "advantages"])
def test_the_gradient_is_the_slope(kind, rows, recompute, monkeypatch):
    """Of each parameter alone and of all together, along random directions; logits in one chunk or many."""
    monkeypatch.setattr(gpt2, "chunk_rows", lambda config, n, *_: min(n, rows))
    model, rng = random_model("float64", recompute), np.random.default_rng(4)
    tokens, targets = batch(model)
    weights = token_weights(kind, *tokens.shape)
    model.forward(tokens, targets, weights)
    model.backward()
    for names in [*([name] for name in model.params), list(model.params)]:
        start = {name: model.params[name].copy() for name in names}
        direction = {name: rng.standard_normal(start[name].shape) for name in names}

        def along(h, start=start, direction=direction):
            for name in start:
                model.params[name][...] = start[name] + h * direction[name]
            return (weights * model.losses(tokens, targets)).sum()

        h = 1e-4
        slope = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
        along(0)
        wanted = sum((model.grads[name] * direction[name]).sum() for name in names)
        size = math.sqrt(sum((model.grads[name] ** 2).sum() for name in names))
        assert size > 1e-4 and abs(slope - wanted) < 1e-6 * size, f"{names}: slope {slope}, gradient {wanted}"


def test_weights_left_out_are_the_mean():
    model = random_model("float64")
    tokens, targets = batch(model)
    loss = model.forward(tokens, targets)
    assert loss.shape == (1,) and math.isclose(loss[0], model.losses(tokens, targets).mean(), rel_tol=1e-12)
    model.backward()
    wanted = gradients(model)
    model.sums[:] = 0
    np.testing.assert_array_equal(model.forward(tokens, targets, np.full((3, 9), 1 / 27)), loss)
    model.backward()
    assert_same(gradients(model), wanted, rtol=1e-12)


def test_micro_batches_add_up_to_the_batch():
    model = random_model("float64")
    tokens, targets = batch(model, B=6)
    weights = np.random.default_rng(5).standard_normal((6, 9))
    loss = model.forward(tokens, targets, weights)
    model.backward()
    whole = gradients(model)
    assert math.isclose(loss[0], (weights * model.losses(tokens, targets)).sum(), rel_tol=1e-9)
    model.sums[:] = 0
    for rows in (slice(0, 3), slice(3, 4), slice(4, 6)):
        last = model.forward(tokens[rows], targets[rows], weights[rows])
        model.backward()
    assert_same(gradients(model), whole, rtol=1e-9, atol=1e-12)
    assert math.isclose(last[0], loss[0], rel_tol=1e-9)  # it adds up over passes as the gradients do


def test_backward_is_of_the_last_forward_only():
    """Also when passes of other shapes, evaluation and decoding come between."""
    model = random_model("float64")
    tokens, targets = batch(model)
    model.forward(tokens, targets)
    model.backward()
    wanted = gradients(model)
    model.flat_grads[:] = 0
    model.forward(*batch(model, 5, 16, seed=6))
    model.forward(*batch(model, 1, 1, seed=7))
    model.forward(tokens, targets)
    other, other_targets = batch(model, 4, 12, seed=8)
    model.losses(other, other_targets)
    model.logits(other)
    model.decode(other, model.new_cache(4, 16))
    model.backward()
    assert_same(gradients(model), wanted, rtol=1e-12)


def test_backward_follows_one_forward():
    model = random_model()
    with pytest.raises(RuntimeError, match="forward"):
        model.backward()
    model.forward(*batch(model))
    model.backward()
    with pytest.raises(RuntimeError, match="forward"):
        model.backward()


def test_a_refused_forward_leaves_nothing_to_go_back_from():
    model = random_model()
    model.forward(*batch(model))
    tokens, targets = batch(model)
    with pytest.raises(ValueError):
        model.forward(tokens, targets[:, :-1])
    before = model.flat_grads.copy()
    with pytest.raises(UserError):
        model.forward(tokens, targets + 100)
    np.testing.assert_array_equal(model.flat_grads, before)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_logits_and_forward_agree(dtype):
    model = random_model(dtype)
    tokens, targets = batch(model)
    logits = model.logits(tokens).astype(float)
    assert logits.shape == (3, 9, 23)
    wanted = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(model.losses(tokens, targets), wanted, atol=tolerance)
    np.testing.assert_allclose(model.forward(tokens, targets), [wanted.mean()], atol=tolerance)


def test_the_future_is_not_seen():
    model = random_model()
    tokens, _ = batch(model)
    logits = model.logits(tokens)
    tokens[:, 5:] = 0
    np.testing.assert_array_equal(model.logits(tokens)[:, :5], logits[:, :5])


def test_same_bits_every_time_on_the_same_number_of_threads():
    """On another number, the tiles of the products are others, which BLAS may round differently."""
    results = []
    for threads in (1, 1, 2, 2, 3, 3):
        pool.THREADS = threads
        model = GPT2(GPT2Config(n_layer=2, n_head=3, n_embd=96, n_positions=300, vocab_size=3000))
        optimizer = AdamW(model)
        for seed in range(2):
            losses = model.forward(*batch(model, 2, 280, seed))
            model.backward()
            norm = optimizer.step(1e-3)
        results.append((losses, norm, model.flat_params))
    for first, second in zip(results[::2], results[1::2]):
        for one, two in zip(first, second):
            np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(first[0], results[0][0], rtol=1e-5)
        np.testing.assert_allclose(first[1], results[0][1], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_reference_trains_and_decodes_like_the_cpu(dtype):
    """The whole model on reference.py, the optimizer included."""
    tolerance = 1e-4 if dtype == "float32" else 1e-11
    models = [GPT2(GPT2Config(**SMALL), device, dtype) for device in ("cpu", "reference")]
    optimizers = [AdamW(model) for model in models]
    for seed in range(3):
        results = []
        for model, optimizer in zip(models, optimizers):
            losses = model.forward(*batch(model, seed=seed))
            model.backward()
            results.append((losses, optimizer.step(0.01), model.flat_params))
        for one, two in zip(*results):
            np.testing.assert_allclose(two, one, atol=tolerance)
    tokens, _ = batch(models[0])
    logits = [model.decode(tokens, model.new_cache(3, 16)) for model in models]
    np.testing.assert_allclose(logits[1], logits[0], atol=tolerance)


def test_an_untrained_model_knows_nothing():
    model = GPT2(GPT2Config(n_layer=4, n_head=4, n_embd=128, n_positions=128, vocab_size=5000))
    losses = model.losses(*batch(model, 2, 128))
    assert abs(losses.mean() - math.log(5000)) < 0.1
    assert np.abs(losses - math.log(5000)).max() < 1.5


def test_it_learns():
    """A few dozen steps on one batch: next to no loss."""
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=23))
    optimizer, (tokens, targets) = AdamW(model, weight_decay=0), batch(model, 2, 16)
    for _ in range(60):
        loss = model.forward(tokens, targets)
        model.backward()
        optimizer.step(1e-2)
    assert loss[0] < 0.01


@pytest.mark.parametrize("method", ["forward", "losses", "logits", "decode"])
@pytest.mark.parametrize(
    "tokens, error, words",
    [
        ([[1, 2, 23]], UserError, "token 23"),
        ([[1, -1, 2]], UserError, "token -1"),
        ([[1, 2**32, 2]], UserError, f"token {2**32}"),
        ([[1] * 17], UserError, "17 tokens"),
        ([1, 2, 3], ValueError, "B, T"),
        ([[[1]]], ValueError, "B, T"),
        ([[]], ValueError, "B, T"),
        (np.zeros((0, 3), int), ValueError, "B, T"),
    ],
)
def test_tokens_that_are_none(method, tokens, error, words):
    model = random_model()
    more = {"forward": [tokens], "losses": [tokens], "decode": [model.new_cache(1, 16)]}.get(method, [])
    with pytest.raises(error, match=words):
        getattr(model, method)(tokens, *more)


def test_targets_and_weights_of_another_shape():
    model = random_model()
    tokens, targets = batch(model)
    flat, thin = np.ones(27), np.ones((3, 1))
    for arguments in ((tokens, targets[:2]), (tokens, targets, flat), (tokens, targets, thin)):
        with pytest.raises(ValueError, match="differ"):
            model.forward(*arguments)
    with pytest.raises(ValueError, match="differ"):
        model.losses(tokens, targets[:, 1:])
    with pytest.raises(UserError, match="token 23"):
        model.forward(tokens, np.where(targets == targets[0, 0], 23, targets))


# ------------------------------------------------------------------------------------------------------------
# Sizes and initialisation


@pytest.mark.parametrize(
    "preset, n", [("d12", 124_439_808), ("d24", 354_823_168), ("d36", 774_030_080), ("d48", 1_557_611_200)]
)
def test_the_four_sizes_of_gpt2(preset, n):
    config = GPT2Config(**gpt2.PRESETS[preset])
    assert config.n_params() == n and config.padded_vocab_size == 50304
    assert sum(math.prod(shape) for shape in config.shapes().values()) == n
    products = 12 * config.n_layer * config.n_embd**2 + 50257 * config.n_embd  # multiplications a token
    attention = config.n_layer * config.n_embd * 1024  # q k^T and p v, of which causality leaves half
    assert math.isclose(config.flops_per_token(1024), 6 * (products + attention), rel_tol=2e-3)


@pytest.mark.parametrize("B, T", [(1, 128), (4, 64)])
def test_the_memory_estimate_is_what_training_takes(B, T):
    config = GPT2Config(n_layer=3, n_head=4, n_embd=128, n_positions=128, vocab_size=2560)
    tracemalloc.start()
    try:
        model = GPT2(config)
        optimizer = AdamW(model)
        model.forward(*batch(model, B, T))
        model.backward()
        optimizer.step(1e-3)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    estimate = gpt2.memory(config, B, T)
    assert 0.9 < sum(estimate.values()) / taken < 1.15, f"{estimate}, taken {taken}"
    assert estimate["parameters"] == 4 * config.n_params() and estimate["moments"] == 8 * config.n_params()


def test_gpt2_small_trains_in_the_memory_that_was_promised():
    assert sum(gpt2.memory(GPT2Config(), 1, 1024).values()) < 4.5e9


def test_initialisation():
    model = GPT2(GPT2Config(n_layer=8, n_head=4, n_embd=128, n_positions=256, vocab_size=1000))
    for name, value in model.params.items():
        if name.endswith(".bias"):
            assert not value.any(), name
        elif value.ndim == 1:
            assert (value == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert math.isclose(value.std(), std, rel_tol=0.03) and abs(value.mean()) < 0.03 * std, name


def test_the_seed_decides():
    a, b, c = (GPT2(GPT2Config(**SMALL), seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.flat_params, b.flat_params)
    assert not np.array_equal(a.flat_params, c.flat_params)
    assert len({value.tobytes() for value in a.params.values() if value.ndim == 2}) == 10  # no two alike


def test_parameters_are_views_of_one_buffer():
    """wte without its padding; every element in one place only."""
    model = random_model()
    for views, buffer in ((model.params, model.flat_params), (model.grads, model.flat_grads)):
        assert {name: view.shape for name, view in views.items()} == model.config.shapes()
        buffer[:] = 0
        for view in views.values():
            view[...] += 1
        assert buffer.max() == 1 and buffer.sum() == model.config.n_params()


@pytest.mark.parametrize(
    "wrong", [dict(n_layer=0), dict(n_head=3), dict(n_embd=-8), dict(vocab_size=2.5), dict(n_positions="16")]
)
def test_sizes_that_make_no_model(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        GPT2Config(**{**SMALL, **wrong})


def test_settings_that_do_not_exist():
    with pytest.raises(UserError, match="float16"):
        GPT2(GPT2Config(**SMALL), dtype="float16")
    with pytest.raises(ValueError, match="tpu"):
        GPT2(GPT2Config(**SMALL), device="tpu")


# ------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 1, 3, 1], [2, 7]])
def test_decode_in_pieces_is_the_full_forward(cuts):
    model = random_model()
    tokens, _ = batch(model)
    wanted, cache, at = model.logits(tokens), model.new_cache(3, 11), 0
    for T in cuts:
        logits = model.decode(tokens[:, at : at + T], cache)
        at += T
        assert logits.shape == (3, 23)
        np.testing.assert_allclose(logits, wanted[:, at - 1], atol=1e-5)
        np.testing.assert_array_equal(cache.lengths, [at] * 3)


def test_decode_rows_of_different_lengths():
    """A padded prefill, then padded pieces, then single steps: each row as if it were alone."""
    model, rng = random_model(n_positions=64), np.random.default_rng(9)
    rows = rng.integers(0, 23, (4, 60))
    cache, at = model.new_cache(4, 64), np.zeros(4, int)
    for lengths in ([1, 7, 13, 4], [5, 1, 2, 3], [1, 1, 1, 1], [1, 1, 1, 1], [30, 1, 9, 2]):
        T = max(lengths)
        tokens = rng.integers(0, 23, (4, T))  # padding is any token
        for b, n in enumerate(lengths):
            tokens[b, :n] = rows[b, at[b] : at[b] + n]
        logits = model.decode(tokens, cache, lengths)
        at += lengths
        np.testing.assert_array_equal(cache.lengths, at)
        for b in range(4):
            np.testing.assert_allclose(logits[b], model.logits(rows[b : b + 1, : at[b]])[0, -1], atol=1e-5)


@pytest.mark.parametrize("rows", [[0, 2], [2, 1, 0], [1, 1, 1, 1, 1], [0], np.array([2, 0])])
def test_cache_rows_can_be_dropped_reordered_and_repeated(rows):
    model = random_model()
    tokens, _ = batch(model)
    cache, lengths = model.new_cache(3, 16), np.array([4, 6, 5])
    model.decode(tokens[:, :6], cache, lengths)
    cache.select(rows)
    np.testing.assert_array_equal(cache.lengths, lengths[rows])
    assert cache.keys.flags.c_contiguous and cache.values.flags.c_contiguous
    new = np.random.default_rng(10).integers(0, 23, (2, len(rows)))
    for step in range(2):  # copies of a row go their own ways
        logits = model.decode(new[step, :, None], cache)
    for i, b in enumerate(rows):
        whole = np.concatenate([tokens[b, : lengths[b]], new[:, i]])[None]
        np.testing.assert_allclose(logits[i], model.logits(whole)[0, -1], atol=1e-5)


def test_a_cache_does_not_change_with_another():
    """Two caches, and other passes of the model, share activations but no state."""
    model = random_model()
    tokens, targets = batch(model)
    wanted = model.logits(tokens)
    one, two = model.new_cache(3, 16), model.new_cache(1, 16)
    model.decode(tokens[:, :8], one)
    model.decode(tokens[1:2, :3], two)
    model.forward(targets, tokens)
    logits = model.decode(tokens[:, 8:], one)
    np.testing.assert_allclose(model.decode(tokens[1:2, 3:6], two), wanted[1:2, 5], atol=1e-5)
    np.testing.assert_allclose(logits, wanted[:, 8], atol=1e-5)


def test_the_context_ends():
    model = random_model()
    with pytest.raises(UserError, match="context of 16"):
        model.new_cache(1, 17)
    cache = model.new_cache(1, 16)
    model.decode([[1] * 15], cache)
    before = cache.keys.copy()
    with pytest.raises(UserError, match="context is 16"):
        model.decode([[1, 2]], cache)
    np.testing.assert_array_equal(cache.keys, before)
    assert cache.lengths[0] == 15
    tokens = [[1] * 15 + [2]]
    np.testing.assert_allclose(model.decode([[2]], cache), model.logits(tokens)[:, -1], atol=1e-5)
    with pytest.raises(UserError, match="context"):
        model.decode([[2]], cache)


def test_decode_refuses_lengths_that_do_not_fit():
    model = random_model()
    for T, lengths, rows in ((2, [3], 1), (2, [0], 1), (2, [1, 1], 1), (1, None, 2)):
        with pytest.raises(ValueError, match="rows"):
            model.decode([[1] * T], model.new_cache(rows, 16), lengths)


# ------------------------------------------------------------------------------------------------------------
# AdamW


def test_padding_rows_stay_zero():
    model = GPT2(GPT2Config(**SMALL))
    optimizer = AdamW(model)
    assert model.wte.shape == (128, 10)
    for seed in range(4):
        model.forward(*batch(model, seed=seed))
        model.backward()
        assert not model.dwte[23:].any()
        optimizer.step(0.1)
    assert not model.wte[23:].any() and model.wte[:23].all()


def test_decay_is_for_matrices_only():
    """Without gradients, a step shrinks matrices and embeddings by lr * weight_decay and nothing else."""
    model = random_model("float64")
    before = {name: value.copy() for name, value in model.params.items()}
    AdamW(model, weight_decay=0.1).step(0.5)
    for name, value in model.params.items():
        shrunk = before[name] * (0.95 if value.ndim == 2 else 1)
        np.testing.assert_allclose(value, shrunk, rtol=1e-14, err_msg=name)


def test_a_step_clips_counts_and_clears():
    """Against AdamW in three lines, on whole models: norm before clipping, gradients zero afterwards."""
    model = random_model("float64")
    optimizer, m, v = AdamW(model, weight_decay=0.3), {}, {}
    for step, (lr, max_norm) in enumerate([(0.1, 1e-2), (0.2, 1.0), (0.05, np.inf)], 1):
        model.forward(*batch(model, seed=step))
        model.backward()
        norm = math.sqrt(sum((g**2).sum() for g in model.grads.values()))
        wanted = {}
        for name, p in model.params.items():
            g = model.grads[name] * min(1, max_norm / norm)
            m[name] = 0.9 * m.get(name, 0) + 0.1 * g
            v[name] = 0.95 * v.get(name, 0) + 0.05 * g * g
            update = m[name] / (1 - 0.9**step) / (np.sqrt(v[name] / (1 - 0.95**step)) + 1e-8)
            wanted[name] = p - lr * (update + (0.3 * p if p.ndim == 2 else 0))
        assert math.isclose(optimizer.step(lr, max_norm)[0], norm, rel_tol=1e-12)
        assert_same(model.params, wanted, rtol=1e-9, atol=1e-12)
        assert not model.sums.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, "norm's limit", "loss's limit", "loss"])
def test_a_step_that_is_left_out_changes_nothing(bad):
    """Not the parameters, not the moments, and not the steps after it."""
    one, two = random_model(), random_model()
    optimizers = AdamW(one), AdamW(two)
    for seed in range(3):
        for model, optimizer in zip((one, two), optimizers):
            model.forward(*batch(model, seed=seed))
            model.backward()
            if model is two and seed < 2:  # as the first step and as a later one
                arrays = model.flat_params, optimizer.m, optimizer.v, model.flat_grads
                kept = [array.copy() for array in arrays]
                if bad == "loss":
                    model.loss[0] = np.nan
                elif not isinstance(bad, str):
                    model.flat_grads[7] = bad
                limits = [1e-6 if bad == f"{what}'s limit" else np.inf for what in ("norm", "loss")]
                norm = optimizer.step(0.1, 1.0, *limits)
                assert np.isfinite(norm) == isinstance(bad, str)
                for array, before in zip(arrays[:3], kept):
                    np.testing.assert_array_equal(array, before)
                assert not model.flat_grads.any()
                model.flat_grads[:] = kept[3]
            optimizer.step(0.1)
    np.testing.assert_array_equal(one.flat_params, two.flat_params)


def test_the_optimizer_goes_on_where_it_stopped(tmp_path):
    def train(model, optimizer, seeds):
        for seed in seeds:
            model.forward(*batch(model, seed=seed))
            model.backward()
            optimizer.step(0.01)

    straight, resumed = random_model(), random_model()
    optimizer = AdamW(straight)
    train(straight, optimizer, range(3))
    straight.save_pretrained(tmp_path)
    optimizer.save(tmp_path / "optimizer.safetensors")
    train(straight, optimizer, range(3, 6))

    resumed = GPT2.from_pretrained(tmp_path)
    optimizer = AdamW(resumed)
    optimizer.load(tmp_path / "optimizer.safetensors")
    train(resumed, optimizer, range(3, 6))
    np.testing.assert_array_equal(resumed.flat_params, straight.flat_params)


def test_an_optimizer_of_another_model(tmp_path):
    AdamW(random_model(n_layer=1)).save(tmp_path / "other")
    random_model().save_pretrained(tmp_path)
    optimizer = AdamW(random_model())
    with pytest.raises(UserError, match="another model"):
        optimizer.load(tmp_path / "other")
    with pytest.raises(UserError, match="another model"):
        optimizer.load(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="missing"):
        optimizer.load(tmp_path / "absent")


# ------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def saved(tmp_path):
    """A model, and the directory that holds it."""
    model = random_model()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def rewrite(directory, change):
    """Let `change` alter the {name: array} of a checkpoint, as a file from elsewhere would."""
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    path.unlink()
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def assert_loads(directory, model):
    np.testing.assert_array_equal(GPT2.from_pretrained(directory).flat_params, model.flat_params)


def test_a_round_trip_keeps_every_bit(saved, tmp_path):
    model, directory = saved
    again = GPT2.from_pretrained(directory)
    assert again.config == model.config
    np.testing.assert_array_equal(again.flat_params.view(np.int32), model.flat_params.view(np.int32))
    first = (directory / "model.safetensors").read_bytes()
    again.save_pretrained(directory / "deeper" / "still")
    assert (directory / "deeper" / "still" / "model.safetensors").read_bytes() == first


def test_the_files_are_hugging_faces(saved):
    """Names with their prefix, the true vocabulary, one wte for both ends, and PyTorch's metadata."""
    model, directory = saved
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    with safetensors.safe_open(directory / "model.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "pt"
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == {"transformer." + name: shape for name, shape in model.config.shapes().items()}
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    assert {name: config[name] for name in SMALL} == SMALL


def test_names_without_their_prefix(saved):
    model, directory = saved

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    rewrite(directory, change)
    assert_loads(directory, model)


def test_the_causal_mask_in_openais_files_is_ignored(saved):
    model, directory = saved

    def change(tensors):
        for i in range(2):
            tensors[f"transformer.h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), bool))
            tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)

    rewrite(directory, change)
    assert_loads(directory, model)


def test_lm_head_is_wte_or_refused(saved):
    model, directory = saved
    rewrite(
        directory,
        lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].copy()}),
    )
    assert_loads(directory, model)
    rewrite(directory, lambda tensors: tensors["lm_head.weight"].__iadd__(1))
    with pytest.raises(UserError, match="lm_head"):
        GPT2.from_pretrained(directory)


def in_pieces(directory, sizes=(5, 1, 100)):
    """Cut model.safetensors into several files with an index, as large models come."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, index = list(tensors), {}
    for i, size in enumerate(sizes, 1):
        path = f"model-{i:05d}-of-{len(sizes):05d}.safetensors"
        taken, names = names[:size], names[size:]
        safetensors.numpy.save_file({name: tensors[name] for name in taken}, directory / path)
        index |= dict.fromkeys(taken, path)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_several_files(saved):
    model, directory = saved
    in_pieces(directory)
    assert_loads(directory, model)


def test_several_files_of_which_one_is_gone(saved):
    _, directory = saved
    in_pieces(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors is missing"):
        GPT2.from_pretrained(directory)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(saved, text):
    _, directory = saved
    in_pieces(directory)
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        GPT2.from_pretrained(directory)


def test_half_precision_files_are_widened(saved):
    model, directory = saved
    rewrite(directory, lambda tensors: tensors.update({n: t.astype(np.float16) for n, t in tensors.items()}))
    loaded = GPT2.from_pretrained(directory)
    np.testing.assert_array_equal(loaded.flat_params, model.flat_params.astype(np.float16).astype(np.float32))


def test_bfloat16_files_are_widened(saved):
    """NumPy has no such type: the file is written by hand, a header and the upper halves of float32."""
    model, directory = saved
    header, data = {}, b""
    for name, parameter in model.params.items():
        start = len(data)
        data += (np.ascontiguousarray(parameter).view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = dict(dtype="BF16", shape=parameter.shape, data_offsets=[start, len(data)])
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    loaded = GPT2.from_pretrained(directory)
    wanted = (model.flat_params.view(np.uint32) >> 16 << 16).view(np.float32)
    np.testing.assert_array_equal(loaded.flat_params, wanted)


def test_float64_files_are_narrowed(saved):
    model, directory = saved
    rewrite(directory, lambda tensors: tensors.update({n: t.astype(np.float64) for n, t in tensors.items()}))
    assert_loads(directory, model)


def broken(directory, kind):
    weights, config = directory / "model.safetensors", directory / "config.json"
    values = json.loads(config.read_text())
    h0 = "transformer.h.0.attn.c_attn.weight"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "no safetensors":
        weights.write_bytes(b"PK\x03\x04 a zip file of pickles, perhaps" * 10)
    elif kind == "no weights":
        weights.unlink()
    elif kind == "a tensor missing":
        rewrite(directory, lambda tensors: tensors.pop(h0))
    elif kind == "a tensor too many":
        rewrite(directory, lambda tensors: tensors.update({"transformer.h.2.ln_1.bias": np.zeros(10)}))
    elif kind == "a tensor transposed":
        rewrite(directory, lambda tensors: tensors.update({h0: np.ascontiguousarray(tensors[h0].T)}))
    elif kind == "another vocabulary":
        config.write_text(json.dumps(values | {"vocab_size": 24}))
    elif kind == "fewer layers":
        config.write_text(json.dumps(values | {"n_layer": 1}))
    elif kind == "no config":
        config.unlink()
    elif kind == "config is no json":
        config.write_text("{")
    elif kind == "config is a list":
        config.write_text("[]")
    elif kind == "config is no text":
        config.write_bytes(b"\xff\xfe\x00")
    elif kind == "llama":
        config.write_text(json.dumps({"model_type": "llama", "hidden_size": 10}))
    elif kind == "relu":
        config.write_text(json.dumps(values | {"activation_function": "relu"}))
    elif kind == "odd heads":
        config.write_text(json.dumps(values | {"n_head": 3}))
    elif kind == "a size in quotes":
        config.write_text(json.dumps(values | {"n_layer": "2"}))


@pytest.mark.parametrize(
    "kind, words",
    [
        ("truncated", "model.safetensors cannot be read"),
        ("empty", "model.safetensors cannot be read"),
        ("no safetensors", "model.safetensors cannot be read"),
        ("no weights", "model.safetensors is missing"),
        ("a tensor missing", r"h\.0\.attn\.c_attn\.weight"),
        ("a tensor too many", r"h\.2\.ln_1\.bias .* 2 layers"),
        ("a tensor transposed", r"h\.0\.attn\.c_attn\.weight .*\(30, 10\).*\(10, 30\)"),
        ("another vocabulary", r"wte\.weight .*\(23, 10\).*\(24, 10\)"),
        ("fewer layers", r"h\.1\..* 1 layer"),
        ("no config", "no config.json"),
        ("config is no json", "config.json cannot be read"),
        ("config is a list", "only GPT-2"),
        ("config is no text", "config.json cannot be read"),
        ("llama", "model_type = gpt2"),
        ("relu", "activation_function = gelu_new"),
        ("odd heads", "multiple of n_head 3"),
        ("a size in quotes", "n_layer"),
    ],
)
def test_what_is_no_checkpoint(saved, kind, words):
    """One line that names the file or the tensor."""
    _, directory = saved
    broken(directory, kind)
    with pytest.raises(UserError, match=words) as error:
        GPT2.from_pretrained(directory)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(directory))


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        GPT2.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"config.json|checkpoint"):
        GPT2.from_pretrained(tmp_path / "file")


def test_a_full_disk_leaves_the_old_checkpoint(saved, monkeypatch):
    model, directory = saved
    kept = GPT2.from_pretrained(directory)
    model.flat_params[:] = 0

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            model.save_pretrained(directory)
    assert_loads(directory, kept)


# ------------------------------------------------------------------------------------------------------------
# What SFT and RL ask of the model


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_tokens_of_weight_0_are_left_out_and_count_nothing(share):
    """Logits for the weighted tokens alone: loss and gradients of a tiny weight on the others."""
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=13, vocab_size=37), dtype="float64")
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, 37, (2, 3, 13))
    weights = np.where(rng.random((3, 13)) < share, rng.standard_normal((3, 13)), 0)
    weights[1, 5] = 1.0
    dense = model.forward(tokens, targets, np.where(weights, weights, 1e-300))
    model.backward()
    gradients = model.flat_grads.copy()
    model.sums.fill(0)
    loss = model.forward(tokens, targets, weights)
    model.backward()
    np.testing.assert_allclose(loss, dense, rtol=1e-12)
    np.testing.assert_allclose(model.flat_grads, gradients, atol=1e-14)
    with pytest.raises(ValueError, match="no token has a weight"):
        model.forward(tokens, targets, np.zeros((3, 13)))


def test_a_vocabulary_grows_when_sft_begins(tmp_path):
    """The old tokens keep their vectors and their odds against each other; each new one is the mean."""
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=6, vocab_size=30)
    before = GPT2(config, seed=3)
    before.save_pretrained(tmp_path)
    grown = GPT2.from_pretrained(tmp_path, vocab_size=39)
    assert grown.config.vocab_size == 39
    wte = before.params["wte.weight"]
    np.testing.assert_array_equal(grown.params["wte.weight"][:30], wte)
    np.testing.assert_allclose(
        grown.params["wte.weight"][30:], np.tile(wte.mean(0), (9, 1)), rtol=1e-5, atol=1e-8
    )
    tokens = np.array([[1, 2, 29, 4]])
    np.testing.assert_allclose(grown.logits(tokens)[..., :30], before.logits(tokens), atol=1e-6)
    grown.forward([[30, 38]], [[38, 31]])  # the new ones can be read and said
    assert GPT2.from_pretrained(tmp_path, vocab_size=20).config.vocab_size == 30  # it never shrinks


def test_added_tokens_are_the_mean_also_of_a_bfloat16_checkpoint(tmp_path):
    model = gpt2.GPT2(gpt2.GPT2Config(1, 1, 8, 8, 2000), seed=None)
    model.set("wte.weight", np.full((2000, 8), 0.1005, np.float32))
    model.save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    grown = gpt2.GPT2.from_pretrained(tmp_path, vocab_size=2009).params["wte.weight"]
    np.testing.assert_array_equal(grown[2000:], np.broadcast_to(grown[:1], (9, 8)))


def test_weights_in_a_pickle_are_refused_with_the_way_out(tmp_path):
    gpt2.GPT2(gpt2.GPT2Config(1, 1, 8, 8, 9)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle.*save_pretrained"):
        gpt2.GPT2.from_pretrained(tmp_path)
