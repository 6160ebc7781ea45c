"""GPT-2: the network, forward and backward; decoding with a cache; AdamW; memory and files last.

    tokens (B, T) ──▶ wte[token] + wpe[position] ──▶ x (B, T, C), the residual stream
                                                     │
            ┌────────────────────────────────────────┤  L times:
            │  ln_1 ─▶ c_attn (3C) ─▶ attention ─▶ c_proj ─▶ +     what earlier tokens have to say
            │  ln_2 ─▶ c_fc (4C) ──▶ GELU ───────▶ c_proj ─▶ +     what follows from it at this token
            └────────────────────────────────────────┤
                                                     ▼
                   ln_f ─▶ wte.T ─▶ logits (B, T, V) ─▶ softmax ─▶ the loss, -log p(target)

The residual stream is never overwritten: every layer reads it through a layernorm and adds to it. So its
gradient flows back through the additions unchanged, and every layer adds its own share. The network is that
of Radford et al., "Language models are unsupervised multitask learners" (2019); names and shapes of the
parameters are those of Hugging Face's GPT-2, so checkpoints go there and come from there.

  B batch   T time   C channels = n_embd   L layers   NH heads   HS head size = C / NH
  V vocabulary   Vp V padded to a multiple of 128

Read kernels/reference.py first: it has every operation that is called here. Read train.py next.
"""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes  # noqa: F401  gives NumPy the type bfloat16, for files that hold it
import numpy as np
import safetensors
import safetensors.numpy

import kernels
from common import UserError, write_whole
from hub import from_hub


@dataclasses.dataclass
class GPT2Config:
    """The sizes of a model, under Hugging Face's names; the defaults are GPT-2 small's."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_positions: int = 1024
    vocab_size: int = 50257

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")

    @property
    def padded_vocab_size(self):
        """Rows of wte in memory: a multiple of 128 keeps the matrix products of the classifier aligned."""
        return -(-self.vocab_size // 128) * 128

    def shapes(self):
        """{name: shape} of every parameter, in Hugging Face's order; weights of products are (in, out)."""
        C = self.n_embd
        shapes = {"wte.weight": (self.vocab_size, C), "wpe.weight": (self.n_positions, C)}
        layer = {
            "ln_1": (C,),
            "attn.c_attn": (C, 3 * C),
            "attn.c_proj": (C, C),
            "ln_2": (C,),
            "mlp.c_fc": (C, 4 * C),
            "mlp.c_proj": (4 * C, C),
        }
        for i in range(self.n_layer):
            for name, shape in layer.items():
                shapes[f"h.{i}.{name}.weight"] = shape
                shapes[f"h.{i}.{name}.bias"] = shape[-1:]
        shapes["ln_f.weight"] = shapes["ln_f.bias"] = (C,)
        return shapes

    def n_params(self):
        return sum(math.prod(shape) for shape in self.shapes().values())

    def flops_per_token(self, T):
        """FLOP of forward and backward at context T.

        Six for each parameter that multiplies (all but wpe's): a multiplication and an addition forward,
        twice as many backward. Attention's two products take 2 T C each in every layer; causality leaves half
        of them, once forward and twice backward.
        """
        return 6 * (self.n_params() - self.n_positions * self.n_embd) + 6 * self.n_layer * self.n_embd * T


PRESETS = {  # GPT-2's four sizes by their depth, and one that a laptop trains in minutes
    "tiny": dict(n_layer=4, n_head=4, n_embd=128),
    "d12": dict(n_layer=12, n_head=12, n_embd=768),
    "d24": dict(n_layer=24, n_head=16, n_embd=1024),
    "d36": dict(n_layer=36, n_head=20, n_embd=1280),
    "d48": dict(n_layer=48, n_head=25, n_embd=1600),
}


# ------------------------------------------------------------------------------------------------------------
# The network


class GPT2:
    """A GPT-2 on one device. params and grads are {name: view} into one flat buffer each.

    device is "reference", "cpu" or "cuda". dtype is that of parameters and activations; gradients, statistics
    and losses are float32 at least, and with bfloat16 the optimizer works on a float32 master copy of the
    parameters. With recompute, backward computes the outputs of layernorm and GELU again instead of keeping
    them, which saves a third of the activations. seed None leaves the parameters 0. UserError if the device
    does not have the dtype.
    """

    def __init__(self, config, device="cpu", dtype="float32", seed=42, recompute=False):
        self.config, self.device, self.dtype, self.recompute = config, device, dtype, recompute
        self.ops = kernels.load(device)
        self._allocate_parameters()
        if seed is not None:
            self._initialise(seed)

    def forward(self, tokens, targets, weights=None):
        """Add the sum of weights * losses to self.loss (1,), a device scalar, and return a copy of it.

        tokens, targets and weights are (B, T) arrays of the host. weights are 1 / (B T) each if not given.
        Tokens of weight 0 get no logits at all, because their loss does not count. The loss adds up over
        forward passes as the gradients do over backward passes, until AdamW.step() clears both, so self.grads
        is the gradient of self.loss.

        All logits (N, Vp) would dwarf everything else in memory, so they exist for a chunk of rows at a time,
        and each chunk becomes losses and then gradients before the next one.
        """
        tokens = self._checked(tokens)
        targets, weights, rows, places = self._weighted_targets(tokens, targets, weights)
        self.pending = None
        self.ops.replay(self.recordings, self._forward, tokens, targets, weights, rows, places)
        self.pending = tokens
        return copy_of(self.loss, self.ops)

    def _forward(self, tokens, targets, weights, rows, places):
        """The computation of forward(), which a GPU records.

        rows (n,) are the indices of the n tokens with a weight, among the N = B T; targets and weights (n,)
        are theirs. places (N,) is the inverse: for each token its index among the n, or, without a weight, n,
        the index of a row of zeros. Both are None where every token has a weight.
        """
        ops, C, V, (B, T) = self.ops, self.config.n_embd, self.config.vocab_size, tokens.shape
        a = self._activations("training", B, T)
        self._transformer(a, tokens, self._causal_attention)
        x, dx = a.ln_f.reshape(-1, C), a.dln_f.reshape(-1, C)  # (N, C)
        if rows is not None:
            x, dx = self._buffer("x", (len(rows), C)), self._buffer("dx", (len(rows) + 1, C))
            ops.take_rows(x, a.ln_f.reshape(-1, C), rows)  # (n, C)

        losses = self._buffer("losses", (len(x),), self.exact)
        # The classifier's part of dwte has a buffer of its own until backward() adds it, so that a forward
        # pass without a backward pass changes no gradient.
        dwte_head = self._buffer("dwte_head", self.wte.shape, self.exact)  # (Vp, C)
        dwte_head.fill(0)
        for z, chunk in self._logit_chunks(len(x)):
            ops.matmul_forward(z, x[chunk], self.wte.T, None)  # (n, Vp) logits
            ops.classifier(losses[chunk], z, targets[chunk], weights[chunk], V)  # z is now dlogits
            ops.matmul_backward(dx[chunk], dwte_head.T, None, z, x[chunk], self.wte.T)
        if rows is not None:
            dx[len(rows) :].fill(0)  # (1, C) the gradient of every token without a weight
            ops.take_rows(a.dln_f.reshape(-1, C), dx, places)  # (N, C)
        ops.weighted_sum(self.loss, losses, weights)

    def _transformer(self, a, tokens, attention, offsets=None):
        """tokens (B, T) -> a.ln_f (B, T, C). attention(i, s) makes s.att from s.qkv in layer i."""
        ops = self.ops
        x = a.embedded  # (B, T, C), the residual stream
        ops.encoder_forward(x, tokens, self.wte, self.params["wpe.weight"], offsets)
        for i, s in enumerate(a.layers):
            ops.layernorm_forward(s.ln_1, s.mean_1, s.rstd_1, x, *self._parameters(f"h.{i}.ln_1"))
            ops.matmul_forward(s.qkv, s.ln_1, *self._parameters(f"h.{i}.attn.c_attn"))  # (B, T, 3C)
            attention(i, s)  # (B, T, C)
            ops.matmul_residual_forward(s.mid, s.att, *self._parameters(f"h.{i}.attn.c_proj"), x)
            ops.layernorm_forward(s.ln_2, s.mean_2, s.rstd_2, s.mid, *self._parameters(f"h.{i}.ln_2"))
            ops.matmul_gelu_forward(s.act, s.pre, s.ln_2, *self._parameters(f"h.{i}.mlp.c_fc"))  # (B, T, 4C)
            ops.matmul_residual_forward(s.out, s.act, *self._parameters(f"h.{i}.mlp.c_proj"), s.mid)
            x = s.out
        ops.layernorm_forward(a.ln_f, a.mean_f, a.rstd_f, x, *self._parameters("ln_f"))

    def _causal_attention(self, i, s):
        self.ops.attention_forward(s.att, s.lse, s.qkv, self.config.n_head)

    def backward(self):
        """Add to grads the gradients of the last forward pass."""
        if self.pending is None:
            raise RuntimeError("backward() follows one forward(tokens, targets)")
        tokens, self.pending = self.pending, None
        self.ops.replay(self.recordings, self._backward, tokens)

    def _backward(self, tokens):
        """The computation of backward(), which a GPU records: _forward() from its end to its beginning.

        a.dx (B, T, C) is the gradient of the residual stream: each layernorm_backward adds to it.
        """
        a, ops = self._activations("training", *tokens.shape), self.ops
        dwte_head = self._buffer("dwte_head", self.wte.shape, self.exact)  # (Vp, C), from _forward()
        ops.residual_forward(self.dwte, self.dwte, dwte_head)  # (Vp, C) an addition: dwte += dwte_head
        inputs = [a.embedded] + [s.out for s in a.layers]  # of each layer, and of ln_f
        a.dx.fill(0)
        w, dw, db = self._weight_and_gradients("ln_f")
        ops.layernorm_backward(a.dx, dw, db, a.dln_f, inputs[-1], w, a.mean_f, a.rstd_f)
        for i, s in reversed(list(enumerate(a.layers))):
            if self.recompute:
                ops.layernorm_forward(s.ln_2, s.mean_2, s.rstd_2, s.mid, *self._parameters(f"h.{i}.ln_2"))
                ops.gelu_forward(s.act, s.pre)
            w, dw, db = self._weight_and_gradients(f"h.{i}.mlp.c_proj")
            ops.matmul_gelu_backward(a.dpre, dw, db, a.dx, s.act, w, s.pre)  # (B, T, 4C)
            w, dw, db = self._weight_and_gradients(f"h.{i}.mlp.c_fc")
            ops.matmul_backward(a.dln, dw, db, a.dpre, s.ln_2, w)  # (B, T, C)
            w, dw, db = self._weight_and_gradients(f"h.{i}.ln_2")
            ops.layernorm_backward(a.dx, dw, db, a.dln, s.mid, w, s.mean_2, s.rstd_2)
            w, dw, db = self._weight_and_gradients(f"h.{i}.attn.c_proj")
            ops.matmul_backward(a.datt, dw, db, a.dx, s.att, w)  # (B, T, C)
            ops.attention_backward(a.dqkv, a.datt, s.att, s.lse, s.qkv, self.config.n_head)  # (B, T, 3C)
            if self.recompute:
                ops.layernorm_forward(s.ln_1, s.mean_1, s.rstd_1, inputs[i], *self._parameters(f"h.{i}.ln_1"))
            w, dw, db = self._weight_and_gradients(f"h.{i}.attn.c_attn")
            ops.matmul_backward(a.dln, dw, db, a.dqkv, s.ln_1, w)  # (B, T, C)
            w, dw, db = self._weight_and_gradients(f"h.{i}.ln_1")
            ops.layernorm_backward(a.dx, dw, db, a.dln, inputs[i], w, s.mean_1, s.rstd_1)
        ops.encoder_backward(self.dwte, self.grads["wpe.weight"], a.dx, tokens)

    def losses(self, tokens, targets):
        """The loss of every token (B, T), on the device, for evaluation: nothing is kept for backward()."""
        tokens, targets = self._checked(tokens), self._checked(targets)
        if tokens.shape != targets.shape:
            raise ValueError(f"tokens {tokens.shape} and targets {targets.shape} differ")
        a = self._activations("evaluation", *tokens.shape)
        self._transformer(a, self.ops.to_device(tokens), self._causal_attention)
        x, targets = a.ln_f.reshape(-1, self.config.n_embd), self.ops.to_device(targets.reshape(-1))
        losses = self.ops.empty(tokens.size, self.exact)
        for z, chunk in self._logit_chunks(tokens.size):
            self.ops.matmul_forward(z, x[chunk], self.wte.T, None)  # (n, Vp)
            self.ops.cross_entropy(losses[chunk], z, targets[chunk], self.config.vocab_size)
        return losses.reshape(tokens.shape)

    def logits(self, tokens):
        """Logits (B, T, V) float32 at every position of tokens (B, T), to look at and to test with."""
        tokens = self._checked(tokens)
        a = self._activations("evaluation", *tokens.shape)
        self._transformer(a, self.ops.to_device(tokens), self._causal_attention)
        out = self.ops.empty((*tokens.shape, len(self.wte)), self.exact)  # (B, T, Vp)
        self.ops.matmul_forward(out, a.ln_f, self.wte.T, None)
        return out[..., : self.config.vocab_size]

    # -- decoding: one token after the other, with the keys and values of those before -----------------------

    def new_cache(self, batch, length):
        """A Cache for the keys and values of `batch` rows of up to `length` tokens."""
        if length > self.config.n_positions:
            raise UserError(f"{length} tokens do not fit the model's context of {self.config.n_positions}")
        return Cache(self, batch, length)

    def decode(self, tokens, cache, lengths=None):
        """Append tokens (B, T) to the cache; return the logits (B, V) after the last token of each row.

        T > 1 is the prefill of a prompt, T = 1 a decode step. lengths (B,), if the rows' lengths differ, says
        how many tokens of each are its own: the rest is padding on the right, which no later token sees.
        UserError if the tokens do not fit the cache.
        """
        ops, tokens = self.ops, self._checked(tokens)
        B, T = tokens.shape
        if lengths is None:
            lengths = np.full(B, T, np.int32)
        else:
            lengths = np.asarray(lengths, np.int32)
            if lengths.shape != (B,) or not 1 <= lengths.min() <= lengths.max() <= T:
                raise ValueError(f"{B} rows of {T} tokens, lengths {lengths}")
        if len(cache.lengths) != B:
            raise ValueError(f"{B} rows of tokens, a cache of {len(cache.lengths)} rows")
        if cache.lengths.max() + T > cache.length:
            raise UserError(
                f"{cache.lengths.max()} + {T} tokens do not fit the room for {cache.length}; "
                f"the model's context is {self.config.n_positions}"
            )
        last, empty_cache = None, False  # the same in every decode step, so that all share a recording
        if T > 1:
            last = np.arange(B, dtype=np.int32) * T + lengths - 1  # (B,) rows of the B T
            empty_cache = not cache.lengths.any()
        arguments = tokens, cache.lengths, last, cache.keys, cache.values, empty_cache
        ops.replay(self.recordings, self._decode, *arguments, overlap=T == 1)
        cache.lengths = cache.lengths + lengths
        return copy_of(self._buffer("next", (B, len(self.wte)), self.exact), ops)[:, : self.config.vocab_size]

    def _decode(self, tokens, offsets, last, keys, values, empty_cache):
        """The computation of decode(), which a GPU records: the logits (B, Vp) go to the buffer "next".

        offsets (B,) are the rows' lengths in the cache. last (B,), if T > 1, are the indices of the rows'
        last tokens among the B T.
        """
        (B, T), C, ops = tokens.shape, self.config.n_embd, self.ops
        a = self._activations("decoding", B, T)
        logits = self._buffer("next", (B, len(self.wte)), self.exact)

        def attention(i, s):
            ops.attention_decode(s.att, s.qkv, keys[i], values[i], offsets, empty_cache)

        self._transformer(a, tokens, attention, offsets)
        x = a.ln_f.reshape(-1, C)  # (B T, C)
        if T > 1:
            x = self._buffer("x", (B, C))
            ops.take_rows(x, a.ln_f.reshape(-1, C), last)
        ops.matmul_forward(logits, x, self.wte.T, None)

    # -- parameters ------------------------------------------------------------------------------------------

    def _allocate_parameters(self):
        ops, dtype = self.ops, self.dtype
        if dtype not in ops.DTYPES:
            raise UserError(
                f"dtype {dtype} does not exist on {self.device}; there is {', '.join(ops.DTYPES)}"
            )
        self.type = ops.DTYPES[dtype]
        self.exact = ops.DTYPES["float64" if dtype == "float64" else "float32"]
        # Matrices come first in the flat buffers: weight decay is for them alone (n_decayed elements).
        padded = self.config.shapes()
        padded["wte.weight"] = (self.config.padded_vocab_size, self.config.n_embd)
        matrices = [(name, shape) for name, shape in padded.items() if len(shape) == 2]
        vectors = [(name, shape) for name, shape in padded.items() if len(shape) == 1]
        self.layout, self.n_decayed = matrices + vectors, flat_length(matrices)
        n = flat_length(self.layout)
        self.flat_master = None if self.type == self.exact else ops.zeros(n, self.exact)
        self.buffers, self.views = {}, {}  # see _buffer() and _activations()
        self.recordings = {}  # of passes, on a GPU; cleared when a buffer is replaced that they write to
        self.pending = None  # tokens of the forward pass that backward belongs to
        self.use_buffers(ops.zeros(n, self.type), ops.zeros(n + ALIGNMENT, self.exact))

    def use_buffers(self, flat_params, sums):
        """Let flat_params (n,) hold the parameters, and sums (n + 64,) what is summed over micro-batches and
        ranks: the gradients, flat_grads (n,), and behind them the loss (1,)."""
        n = len(flat_params)
        self.recordings.clear()
        if self.type == self.exact:
            self.flat_master = flat_params
        self.flat_params, self.sums = flat_params, sums
        self.flat_grads, self.loss = sums[:n], sums[n : n + 1]
        self.params = make_views(flat_params, self.layout)
        self.grads = make_views(self.flat_grads, self.layout)
        self.master = make_views(self.flat_master, self.layout)
        self.wte, self.dwte = self.params["wte.weight"], self.grads["wte.weight"]  # (Vp, C), with the padding
        for views in (self.params, self.grads, self.master):
            views["wte.weight"] = views["wte.weight"][: self.config.vocab_size]

    def share(self, world, zero=False):
        """Give all ranks of a World rank 0's parameters, and buffers that its all_reduce() can sum.

        On a CPU the parameters lie in memory that all ranks share. On GPUs each rank has its own; with zero
        the buffers are padded, so that the parts which the ranks update are equally long.
        """
        if world.size == 1:
            return
        n = len(self.flat_params)
        if self.device != "cuda":
            params = world.zeros(n, self.type)
            if world.rank == 0:
                params[:] = self.flat_params
            self.use_buffers(params, world.zeros_for_sums(n + ALIGNMENT, self.exact))
            return
        world.use_gpus(self.ops, zero)
        if zero:
            padded = -(-n // (ALIGNMENT * world.size)) * ALIGNMENT * world.size
            params, master = self.flat_params, self.flat_master
            if self.type != self.exact:
                self.flat_master = self.ops.zeros(padded, self.exact)
                self.flat_master[:n] = master
            self.use_buffers(
                self.ops.zeros(padded, self.type), self.ops.zeros(padded + ALIGNMENT, self.exact)
            )
            self.flat_params[:n] = params
        world.nccl.broadcast(self.flat_params)
        if self.type != self.exact:
            world.nccl.broadcast(self.flat_master)

    def _initialise(self, seed):
        """N(0, 0.02); the 2 L projections into the residual stream are scaled by 1 / sqrt(2 L)."""
        rng = np.random.default_rng(seed)
        for name, shape in self.config.shapes().items():
            if len(shape) == 2:
                value = rng.standard_normal(shape, np.float32)
                into_the_stream = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if into_the_stream else 0.02
                self.set(name, std * value)
            elif name.endswith(".weight"):  # of a layernorm; biases stay 0
                self.set(name, np.ones(shape, np.float32))

    def set(self, name, value):
        """Give a parameter the values of a NumPy array of its shape."""
        self.ops.assign(self.master[name], value.astype(self.exact))
        self.ops.assign(self.params[name], value.astype(self.type))

    def _parameters(self, name):
        return self.params[name + ".weight"], self.params[name + ".bias"]

    def _weight_and_gradients(self, name):
        return self.params[name + ".weight"], self.grads[name + ".weight"], self.grads[name + ".bias"]

    # -- the inputs and the arrays of a pass -----------------------------------------------------------------

    def _checked(self, tokens):
        """tokens as an int32 array (B, T) on the host, all of them in the vocabulary."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.size == 0:
            raise ValueError(f"tokens are (B, T), not {tokens.shape}")
        if tokens.shape[1] > self.config.n_positions:
            raise UserError(f"{tokens.shape[1]} tokens do not fit the context of {self.config.n_positions}")
        lowest, highest = tokens.min(), tokens.max()
        if lowest < 0 or highest >= self.config.vocab_size:
            bad = lowest if lowest < 0 else highest
            raise UserError(f"token {bad} is not in the model's vocabulary of {self.config.vocab_size}")
        return np.ascontiguousarray(tokens, np.int32)

    def _weighted_targets(self, tokens, targets, weights):
        """targets, weights, rows and places, as _forward() takes them.

        A GPU makes a recording for every n, so n is rounded up to a multiple of an eighth of B T there: some
        tokens of weight 0 are among the n. (SFT's batches of 16 conversations are cut into 121 shapes (B, T)
        in 1,500 steps; with eighths that makes 288 recordings, with any n 2,536.)
        """
        targets = self._checked(targets)
        if weights is None:
            weights = np.full(tokens.shape, 1 / tokens.size)
        weights = np.asarray(weights, self.exact)
        if targets.shape != tokens.shape or weights.shape != tokens.shape:
            raise ValueError(
                f"tokens {tokens.shape}, targets {targets.shape}, weights {weights.shape} differ"
            )
        targets, weights = targets.reshape(-1), weights.reshape(-1)  # (N,)
        rows = np.flatnonzero(weights)  # (n,)
        if len(rows) == 0:
            raise ValueError("no token has a weight")
        N, n = len(weights), len(rows)
        if self.ops.ROUND_TO_EIGHTHS:
            eighth = -(-N // 8)
            n = min(N, -(-n // eighth) * eighth)
            rows = np.concatenate([rows, np.flatnonzero(weights == 0)[: n - len(rows)]])
        if n == N:
            return targets, weights, None, None
        places = np.full(N, n, np.int32)
        places[rows] = np.arange(n)
        return targets[rows], weights[rows], rows.astype(np.int32), places

    def _buffer(self, name, shape, dtype=None):
        """An array of this shape, of the parameters' type, in a buffer that only grows."""
        n, buffer = math.prod(shape), self.buffers.get(name)
        if buffer is None or len(buffer) < n:
            self.recordings.clear()  # they write to the smaller buffer
            buffer = self.buffers[name] = self.ops.empty(n, dtype or self.type)
        return buffer[:n].reshape(shape)

    def _activations(self, purpose, B, T):
        """The arrays of a pass of this shape, a.name and a.layers[i].name, in buffers that only grow."""
        a, shape = self.views.get(purpose, (None, None))
        if shape == (B, T):
            return a
        a = SimpleNamespace(layers=[SimpleNamespace() for _ in range(self.config.n_layer)])
        owners = {"": [a], "all": a.layers} | {str(i): [layer] for i, layer in enumerate(a.layers)}
        lists = activation_shapes(self.config, B, T, purpose == "training", self.recompute)
        for what, shapes, dtype in zip(("activations", "statistics"), lists, (self.type, self.exact)):
            buffer = self._buffer(f"{purpose} {what}", (flat_length(shapes),), dtype)
            for name, view in make_views(buffer, shapes).items():
                prefix, _, short = name.rpartition(".")
                for owner in owners[prefix]:
                    setattr(owner, short, view)
        self.views[purpose] = a, (B, T)
        return a

    def _logit_chunks(self, rows):
        """Yield a buffer for logits (n, Vp), and the slice of the rows that it is for, chunk by chunk."""
        n = chunk_rows(self.config, rows, self.ops.LOGITS)
        buffer = self._buffer("logits", (n, self.config.padded_vocab_size))
        for start in range(0, rows, n):
            yield buffer[: min(n, rows - start)], slice(start, min(start + n, rows))

    # -- loading and saving ----------------------------------------------------------------------------------

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors as Hugging Face's GPT2LMHeadModel reads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {"architectures": ["GPT2LMHeadModel"]} | NETWORK | {"torch_dtype": "float32"}
        config |= dataclasses.asdict(self.config) | {"n_ctx": self.config.n_positions}
        end_of_text = 50256 if self.config.vocab_size > 50256 else None
        config |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
        tensors = {
            "transformer." + name: np.ascontiguousarray(self.ops.to_host(self.master[name]), np.float32)
            for name in self.config.shapes()
        }
        write_whole(directory / "model.safetensors", safetensors.numpy.save(tensors, {"format": "pt"}))
        write_whole(directory / "config.json", json.dumps(config, indent=2).encode())

    @classmethod
    def from_pretrained(
        cls, directory, device="cpu", dtype="float32", recompute=False, own_tokens=None, vocab_size=None
    ):
        """Load a directory in Hugging Face's format: ours, OpenAI's GPT-2, one file or several; or a model of
        the hub by its name, as openai-community/gpt2.

        Names may begin with "transformer."; a lm_head.weight must equal wte, as GPT-2's does. own_tokens is
        the number of tokens of the checkpoint's tokenizer: up to 127 rows of wte behind those are padding, as
        nanoGPT writes it, or a [PAD], and are left out. A larger vocab_size adds tokens, whose embeddings are
        the mean of all, so that their logits are in range (Hewitt 2021). UserError names what is missing,
        superfluous or of the wrong shape.
        """
        directory = from_hub(directory)
        config = read_config(directory)
        own = config.vocab_size
        if own_tokens and 0 < own - own_tokens < 128:
            own = own_tokens
        new = max(0, (vocab_size or 0) - own)
        resized = dataclasses.replace(config, vocab_size=own + new)
        model = cls(resized, device, dtype, seed=None, recompute=recompute)
        missing = set(config.shapes())
        for name, value in read_tensors(directory):
            if name.endswith((".attn.bias", ".attn.masked_bias")):  # OpenAI's files hold the causal mask
                continue
            target = "wte.weight" if name == "lm_head.weight" else name
            if target not in model.params:
                raise UserError(f"{directory}: {name} is no parameter of GPT-2 with {config.n_layer} layers")
            shape = config.shapes()[target]
            if value.shape != shape:
                raise UserError(f"{directory}: {name} has shape {value.shape}; config.json asks for {shape}")
            if target == "wte.weight":
                value = value[:own]  # noqa: PLW2901
                if new:
                    mean = value.mean(axis=0, keepdims=True, dtype=np.float64)  # (1, C)
                    value = np.concatenate([value, np.repeat(mean, new, axis=0)])  # noqa: PLW2901
            if target not in missing and not np.array_equal(
                value.astype(model.exact), model.ops.to_host(model.master[target])
            ):
                raise UserError(f"{directory}: lm_head.weight differs from wte.weight; GPT-2's are one")
            model.set(target, value)
            missing.discard(target)
        if missing:
            raise UserError(
                f"{directory}: the weights lack {', '.join(sorted(missing)[:3])} ({len(missing)} in all)"
            )
        return model


class Cache:
    """Keys and values of the tokens read so far: rows have lengths (B,), which may differ, up to `length`."""

    def __init__(self, model, batch, length):
        NH, HS = model.config.n_head, model.config.n_embd // model.config.n_head
        shape = (model.config.n_layer, batch, NH, length, HS)
        self.keys, self.values = model.ops.zeros(shape, model.type), model.ops.zeros(shape, model.type)
        self.model, self.lengths, self.length = model, np.zeros(batch, np.int32), length

    def select(self, rows):
        """Keep these rows, in this order: a row left out is dropped, a row named twice is copied."""
        picked, ops, n = np.asarray(rows, np.int32), self.model.ops, len(rows)
        for name in ("keys", "values"):
            before = getattr(self, name)  # (L, B, NH, length, HS)
            after = ops.empty((len(before), n, *before.shape[2:]), before.dtype)
            for old, new in zip(before, after):
                ops.take_rows(new.reshape(n, -1), old.reshape(len(old), -1), ops.to_device(picked))
            setattr(self, name, after)
        self.lengths = self.lengths[picked]

    def restart(self, rows):
        """Make these rows empty."""
        self.lengths[rows] = 0


# ------------------------------------------------------------------------------------------------------------
# AdamW


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) over flat buffers; weight decay on matrices and embeddings only.

    Each rank of a World updates a part of the parameters, world.part(n). With World.zero, on GPUs, a rank has
    the moments and the master weights of its part alone (ZeRO stage 1, Rajbhandari et al. 2020).
    """

    def __init__(self, model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, world=None):
        self.model, self.betas, self.eps, self.weight_decay = model, betas, eps, weight_decay
        ops, n = model.ops, len(model.flat_grads)
        self.world, shared = world, world is not None and world.size > 1
        self.zero = shared and world.zero
        self.part = world.part(n) if shared else slice(0, n)
        zeros = world.zeros if shared and model.device != "cuda" else ops.zeros
        length = self.part.stop - self.part.start if self.zero else n
        self.m, self.v = zeros(length, model.exact), zeros(length, model.exact)
        if self.zero and model.flat_master is not model.flat_params:
            model.flat_master, model.master = copy_of(model.flat_master[self.part], ops), None
        self.norms = ops.zeros(world.size, model.exact) if self.zero else None  # of the ranks' parts
        self.collected = None  # see collect()
        self.steps = ops.zeros(1, np.int32)  # updates so far: a step that is left out does not count
        self.loss, self.norm = ops.zeros(1, model.exact), ops.zeros(1, model.exact)  # of the last step
        self.plan = ops.zeros(4, model.exact)  # clip, learning rate and the two bias corrections of an update
        self.recordings = {}  # of the update, on a GPU

    def step(self, lr, max_norm=1.0, norm_limit=np.inf, loss_limit=np.inf):
        """Update the parameters, clear gradients and loss; return the norm before clipping, a device scalar.

        Gradients are scaled down to max_norm. If norm or loss is not finite, or over its limit, parameters
        and moments stay as they are: the device decides, and the host does not wait for it.
        """
        model, ops = self.model, self.model.ops
        if self.zero:
            self._norm_of_parts()
        settings = np.array([lr, max_norm, norm_limit, loss_limit], model.exact)
        ops.replay(self.recordings, self._update, settings, self.betas, self.eps, self.weight_decay)
        model.sums[: self.part.start].fill(0)  # the gradients that other ranks have used
        model.sums[self.part.stop :].fill(0)  # and the loss
        if self.world is not None:
            self.world.all_gather(model.flat_params)
        return copy_of(self.norm, ops)

    def _update(self, settings, betas, eps, weight_decay):
        """The computation of step(), which a GPU records; settings (4,) are the arguments of step()."""
        model, ops = self.model, self.model.ops
        ops.assign(self.loss, model.loss)
        if not self.zero:
            ops.global_norm(self.norm, model.flat_grads)
        ops.plan_update(self.plan, self.steps, self.norm, self.loss, settings, *betas)
        arrays = [self._own(a) for a in (model.flat_master, model.flat_grads, self.m, self.v)]  # (n,) each
        copy = None if model.type == model.exact else self._own(model.flat_params)
        n = len(arrays[0])
        decayed = min(max(model.n_decayed - self.part.start, 0), n)
        for elements, decay in ((slice(0, decayed), weight_decay), (slice(decayed, n), 0.0)):
            if elements.start < elements.stop:
                copied = None if copy is None else copy[elements]
                ops.adamw(*[a[elements] for a in arrays], self.plan, *betas, eps, decay, copied)

    def _own(self, array):
        """This rank's part of a flat buffer; with zero some buffers are that part already."""
        return array[self.part] if len(array) == len(self.model.flat_grads) else array

    def _norm_of_parts(self):
        """Fill self.norm (1,), the norm of the whole gradient, from the norms of the ranks' parts of it."""
        ops, rank = self.model.ops, self.world.rank
        ops.global_norm(self.norms[rank : rank + 1], self.model.flat_grads[self.part])
        self.world.all_gather(self.norms)
        ops.global_norm(self.norm, self.norms)

    def collect(self):
        """With zero, gather moments and master weights from the ranks, to be saved; every rank calls it."""
        if not self.zero:
            return
        model = self.model
        self.collected = {"m": self._whole(self.m), "v": self._whole(self.v)}
        if model.type != model.exact:
            model.master = make_views(self._whole(model.flat_master), model.layout)
            model.master["wte.weight"] = model.master["wte.weight"][: model.config.vocab_size]

    def _whole(self, part):
        """All ranks' parts of a buffer, on the host, through the gradients' buffer, free between updates."""
        buffer = self.model.flat_grads
        buffer[self.part] = part
        self.world.all_gather(buffer)
        whole = self.model.ops.to_host(buffer)[: flat_length(self.model.layout)]
        buffer.fill(0)
        return whole

    def save(self, path):
        """Write moments and step count to a safetensors file."""
        tensors = self.collected or {"m": self.model.ops.to_host(self.m), "v": self.model.ops.to_host(self.v)}
        steps = int(self.model.ops.to_host(self.steps)[0])
        write_whole(Path(path), safetensors.numpy.save(tensors, {"steps": str(steps)}))

    def load(self, path):
        """Read what save wrote; UserError if it belongs to another model."""
        n = flat_length(self.model.layout)
        with open_tensors(path) as file:
            if set(file.keys()) != {"m", "v"} or file.get_slice("m").get_shape() != [n]:
                raise UserError(
                    f"{path} holds the optimizer of another model; resume with the flags it began with"
                )
            for name in ("m", "v"):
                whole = np.zeros(len(self.model.flat_grads), self.model.exact)  # with the padding of share()
                whole[:n] = file.get_tensor(name)
                self.model.ops.assign(getattr(self, name), whole[self.part] if self.zero else whole)
            self.model.ops.assign(self.steps, np.array([int(file.metadata()["steps"])], np.int32))


# ------------------------------------------------------------------------------------------------------------
# Memory: flat buffers, and what a run needs


ALIGNMENT = 64  # elements: every view begins at a multiple, where a GPU reads 16 bytes at once


def copy_of(array, ops):
    """A copy on the same device: a number that a later step will not change."""
    copy = ops.empty(array.shape, array.dtype)
    ops.assign(copy, array)
    return copy


def flat_length(shapes):
    """Elements of a flat buffer for [(name, shape)]."""
    return sum(-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for _, shape in shapes)


def make_views(buffer, shapes):
    """{name: view} into a flat buffer, one view behind the other, for shapes [(name, shape)]."""
    views, start = {}, 0
    for name, shape in shapes:
        views[name] = buffer[start : start + math.prod(shape)].reshape(shape)
        start += flat_length([(name, shape)])
    return views


def activation_shapes(config, B, T, training, recompute=False):
    """The arrays of a pass, two lists of (name, shape): activations, and statistics that stay float32.

    "3.att" belongs to layer 3; "all.att" is one array that all layers write in turn. In training each layer
    keeps its arrays for backward, which has some of its own; with `recompute` it computes the outputs of
    layernorm and GELU again.
    """
    C, NH = config.n_embd, config.n_head
    stored = [("embedded", (B, T, C)), ("ln_f", (B, T, C))]
    statistics = [("mean_f", (B, T)), ("rstd_f", (B, T))]
    kept = dict(qkv=3 * C, att=C, mid=C, pre=4 * C, out=C)
    made_again = dict(ln_1=C, ln_2=C, act=4 * C)
    if recompute:
        stored += [(f"all.{name}", (B, T, width)) for name, width in made_again.items()]
    else:
        kept.update(made_again)
    for i in range(config.n_layer) if training else ["all"]:
        stored += [(f"{i}.{name}", (B, T, width)) for name, width in kept.items()]
        statistics += [(f"{i}.{name}", (B, T)) for name in ("mean_1", "rstd_1", "mean_2", "rstd_2")]
        statistics.append((f"{i}.lse", (B, NH, T)))
    if training:
        widths = dict(dx=C, dln=C, datt=C, dqkv=3 * C, dpre=4 * C, dln_f=C)
        stored += [(name, (B, T, width)) for name, width in widths.items()]
    return stored, statistics


def chunk_rows(config, rows, elements):
    """How many of `rows` rows of logits exist at once, where they may have `elements` elements."""
    return min(rows, max(256, elements // config.padded_vocab_size))


def memory(config, B, T, itemsize=4, recompute=False, logits=1 << 22):
    """Bytes that training takes, {what: bytes}, for a micro-batch of B rows of T tokens.

    itemsize is that of parameters and activations; with 2 (bfloat16) there is a float32 master copy.
    logits is how many elements of logits exist at once, the device's LOGITS.
    """
    n, exact = config.n_params(), max(itemsize, 4)
    n_head = config.padded_vocab_size * config.n_embd  # the classifier's gradient has a buffer of its own
    passes = [activation_shapes(config, B, T, training, recompute) for training in (True, False)]
    n_stored = sum(flat_length(stored) for stored, _ in passes)
    n_statistics = sum(flat_length(statistics) for _, statistics in passes)
    n_logits = chunk_rows(config, B * T, logits) * config.padded_vocab_size
    return {
        "parameters": n * itemsize + (n * exact if itemsize < exact else 0),
        "gradients": (n + n_head) * exact,
        "moments": 2 * n * exact,
        "activations": (n_stored + n_logits) * itemsize + n_statistics * exact,
    }


# ------------------------------------------------------------------------------------------------------------
# Files


# What config.json must say of the network: the one that is written here.
NETWORK = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


def read_config(directory):
    """GPT2Config from config.json; UserError for a network that is not GPT-2's."""
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{directory} is no checkpoint: it has no config.json") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    options = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    for name, value in (NETWORK | options).items():
        if not isinstance(values, dict) or values.get(name, value) != value:
            raise UserError(f"{path}: only GPT-2 can be loaded, which has {name} = {value}")
    fields = [field.name for field in dataclasses.fields(GPT2Config)]
    return GPT2Config(**{name: values[name] for name in fields if name in values})


def open_tensors(path):
    """Open a safetensors file; UserError if it is missing, cut short or something else."""
    try:
        return safetensors.safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the checkpoint is not whole") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch or save it again") from None


def read_tensors(directory):
    """Yield (name without "transformer.", float array) from model.safetensors or the files of its index."""
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (directory / names[0]).exists() and index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{index} is damaged; fetch or save the checkpoint again") from None
    if not (directory / names[0]).exists() and (directory / "pytorch_model.bin").exists():
        raise UserError(
            f"{directory} has its weights as pytorch_model.bin, a pickle, which may run any code; save them "
            "as model.safetensors: transformers' save_pretrained() does"
        )
    for name in names:
        with open_tensors(directory / name) as file:
            for key in file.keys():  # noqa: SIM118  (the file is no dict)
                yield key.removeprefix("transformer."), file.get_tensor(key)
