"""Pretraining: text becomes a model that continues text.

    python train.py --data shards/factbook --out runs/factbook            what `make train` does
    python train.py --data shards/factbook --out runs/factbook --resume   go on after Ctrl-C, bit for bit
    python plot.py runs/factbook                                          draw its loss and learning rate

Read gpt2.py first: the model; data.py made the shards. main() tells the story: forward, backward, update,
and a line to watch. sft.py and rl.py use the schedule, the log and the checkpoints of this file.
"""

import itertools
import math
import shlex
import time
from collections import deque
from pathlib import Path

import numpy as np

import console
import data
import gpt2
import kernels
import runs
import workers
from console import UserError, count, duration, number
from tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------------------
# Batches


class Windows:
    """Batches of windows of T + 1 tokens, a pure function of seed and step: nothing to save, nothing to lose.

    Each epoch cuts every shard into windows from another offset and shuffles them. A step takes the next
    `rows` of them; how many processes share the step, and in what micro-batches, changes nothing.
    """

    def __init__(self, shards, T, rows, seed):
        self.shards, self.T, self.rows, self.seed = [s for s in shards if len(s) > T], T, rows, seed
        if not self.shards:
            longest = max((len(s) for s in shards), default=0)
            raise UserError(
                f"the text has {longest} tokens, --seq-len {T} needs {T + 1}; add text or lower it"
            )
        self.counts = [max(1, len(s) // T - 1) for s in self.shards]  # windows, leaving room for the offset
        self.n_windows, self.n_tokens = sum(self.counts), sum(len(s) for s in self.shards)
        self.epoch = None

    def _begin(self, epoch):
        if self.epoch == epoch:
            return
        rng = np.random.default_rng([self.seed, epoch])
        offsets = [rng.integers(len(s) - n * self.T) for s, n in zip(self.shards, self.counts)]
        self.order, self.offsets, self.epoch = rng.permutation(self.n_windows), offsets, epoch

    def _window(self, i):
        """Window i since the beginning of training: (T + 1,) tokens."""
        self._begin(i // self.n_windows)
        i = self.order[i % self.n_windows]
        for shard, n, offset in zip(self.shards, self.counts, self.offsets):
            if i < n:
                start = offset + i * self.T
                return shard[start : start + self.T + 1]
            i -= n
        raise IndexError(i)

    def batch(self, step, first=0, rows=None):
        """tokens and targets (rows, T) int32: rows first.. of the step's global batch."""
        begin = step * self.rows + first
        windows = np.stack([self._window(begin + i) for i in range(rows or self.rows)]).astype(np.int32)
        return windows[:, :-1], windows[:, 1:]


def evaluation_batches(shards, T, rows, max_tokens):
    """tokens and targets (up to `rows`, T) from the beginning of the validation text, in order."""
    windows = [s[i : i + T + 1] for s in shards for i in range(0, len(s) - T, T)]
    if not windows:
        raise UserError(f"the validation text is shorter than --seq-len {T} + 1 tokens; add text or lower it")
    windows = windows[: max(1, max_tokens // T)]
    for i in range(0, len(windows), rows):
        block = np.stack(windows[i : i + rows]).astype(np.int32)
        yield block[:, :-1], block[:, 1:]


def evaluate(model, batches, token_lengths):
    """(mean loss in nats a token, bits per byte of text) over batches of tokens and targets."""
    batches = list(batches)
    read = [model.ops.read_later(model.losses(*batch)) for batch in model.prefetch(batches)]
    nats = sum(float(losses().sum(dtype=np.float64)) for losses in read)
    targets = np.concatenate([targets.reshape(-1) for _, targets in batches])
    return nats / len(targets), nats / math.log(2) / max(int(token_lengths[targets].sum()), 1)


def deal(tokens, targets, n, size):
    """Shares of a micro-batch (B, T) for `size` workers; n tokens are in the whole update."""
    return [(tokens[i::size], targets[i::size], n) for i in range(min(size, len(tokens)))]


def share_of_windows(model, share):
    """Forward and backward over a share; return the sum of its losses."""
    tokens, targets, n = share
    losses = model.forward(tokens, targets, np.full(tokens.shape, 1 / n))  # (B, T)
    model.backward()
    return float(losses.sum(dtype=np.float64))


# ------------------------------------------------------------------------------------------------------------
# The learning rate, and steps to leave out


def learning_rate(step, steps, lr, warmup_steps, final):
    """Of update `step` (from 0): up in a line, down in half a cosine to `final` * lr (GPT-3, appendix B)."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Outliers:
    """z-scores against the last values; what is not finite or too far up is an outlier and stays outside."""

    def __init__(self, threshold, values=(), window=128, least=32):
        self.threshold, self.values, self.least = threshold, deque(values, maxlen=window), least

    def limit(self):
        """The largest value that is no outlier; infinite until there is enough to compare with."""
        if len(self.values) < self.least or not self.threshold:
            return math.inf
        return float(np.mean(self.values) + self.threshold * max(np.std(self.values), 1e-6))

    def z(self, value):
        if len(self.values) < self.least:
            return 0.0
        return float((value - np.mean(self.values)) / max(np.std(self.values), 1e-6))

    def accepts(self, value):
        """Take the value into the window if it is finite and no outlier; say whether."""
        if not math.isfinite(value) or value > self.limit():
            return False
        self.values.append(value)
        return True


# ------------------------------------------------------------------------------------------------------------
# Before the run


def measured_peak(ops, dtype, n=128):
    """FLOP/s of a matrix product of n x n: what this machine can do, and utilization is a share of.

    n doubles until a product takes long enough for its beginning and end not to count.
    """
    rng, best, c = np.random.default_rng(0), math.inf, ops.empty((n, n), dtype)
    a, b = (ops.to_device(rng.standard_normal((n, n), np.float32).astype(dtype)) for _ in range(2))
    for _ in range(5):
        start = time.perf_counter()
        ops.matmul_forward(c, a, b, None)
        ops.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best if best > 1e-2 or n == 4096 else measured_peak(ops, dtype, 2 * n)


def fit(rows, needed, most, free):
    """The largest micro-batch B that divides `rows`, is at most `most`, and takes needed(B) <= free bytes."""
    fitting = (B for B in range(min(rows, most), 1, -1) if rows % B == 0 and needed(B) <= free)
    return next(fitting, 1)


def plan(flags, config, batches, tokens_per_step, memory, step_seconds, peak):
    """What the run will take, said before it takes it."""
    tokens, n = flags.steps * tokens_per_step, config.n_params()
    flops = float(tokens * config.flops_per_token(flags.seq_len))
    split = ", ".join(f"{what} {console.size(n_bytes)}" for what, n_bytes in memory.items())
    epochs = flags.steps * batches.rows / batches.n_windows
    seconds = flags.steps * step_seconds
    cost = f", ${seconds / 3600 * flags.dollars_per_hour:.2f}" if flags.dollars_per_hour else ""
    share = flops / seconds / peak
    for what, text in (
        (
            "model",
            f"{count(n)} parameters: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide;",
        ),
        ("", f"a vocabulary of {config.vocab_size}, a context of {config.n_positions}"),
        ("data", f"{count(batches.n_tokens)} tokens in {flags.data}, seen {epochs:.3g} times"),
        ("training", f"{count(tokens)} tokens in {flags.steps} steps of {tokens_per_step};"),
        ("", f"{count(20 * n)} tokens would be compute-optimal (20 a parameter)"),
        ("compute", f"{count(flops)}FLOP (6 N D, and attention); a matmul runs at {count(peak)}FLOP/s here"),
        ("memory", f"{console.size(sum(memory.values()))}: {split}"),
        ("time", f"{duration(seconds)}{cost}: {step_seconds * 1e3:.0f} ms a step, {share:.0%} utilization"),
    ):
        print(f"{what:10}{text}")


def continuation(model, tokenizer, n, seed, temperature=0.7):
    """A document of up to n tokens by the model, from nothing."""
    n = min(n, model.config.n_positions)
    cache, ids, ops = model.new_cache(1, n), [], model.ops
    drawn, stream = ops.empty(1, np.int32), ops.zeros(1, np.int64)
    logits = model.decode([[tokenizer.eot]], cache)
    for i in range(n - 1):
        ops.sample(drawn, logits, seed, stream, ops.to_device(np.array([i])), temperature, top_p=0.9)
        token = int(ops.to_host(drawn)[0])
        if token == tokenizer.eot:
            break
        ids.append(token)
        logits = model.decode([ids[-1:]], cache)
    return tokenizer.decode(ids)


# ------------------------------------------------------------------------------------------------------------
# The command line

SHORT = dict(short_len=64, short_steps=7000)  # who learns to look back in short rows learns it sooner
LONG = dict(seq_len=1024, short_len=1024, short_steps=0, warmup_steps=700)
RECIPES = {  # what flags default to, by --model: tiny tried out here, the others llm.c's and GPT-3's settings
    "tiny": dict(lr=3e-3, steps=10000, total_batch_tokens=1024, seq_len=256, warmup_steps=100) | SHORT,
    "d12": dict(lr=6e-4, steps=18865, total_batch_tokens=524288) | LONG,
    "d24": dict(lr=3e-4, steps=18865, total_batch_tokens=524288) | LONG,
    "d36": dict(lr=2.5e-4, steps=18865, total_batch_tokens=524288) | LONG,
    "d48": dict(lr=6e-4, steps=32000, total_batch_tokens=1048576) | LONG,
}


def parser():
    flags = console.Parser(prog="train.py", description=__doc__)
    whole, some, share = number(int, low=1), number(float, above=0), number(float, low=0)
    group = flags.add_argument_group("data and output")
    group.add_argument("--data", default="shards/factbook", metavar="DIR", help="shards that data.py made")
    group.add_argument("--out", default="runs/factbook", metavar="RUN", help="the run's directory, a new one")
    group.add_argument(
        "--resume", action="store_true", help="go on from RUN's newest checkpoint, with its flags"
    )
    group.add_argument("--init-from", metavar="DIR", help="begin with the weights of a checkpoint")
    group = flags.add_argument_group("model")
    group.add_argument("--model", choices=gpt2.PRESETS, default="tiny", help="a preset; d12 is GPT-2 small")
    for name, what in (("layer", "layers"), ("head", "heads"), ("embd", "channels")):
        group.add_argument(f"--n-{name}", type=whole, metavar="N", help=f"{what}, instead of the preset's")
    group.add_argument("--n-positions", type=whole, metavar="N", help="context; 1024, or --seq-len for tiny")
    lines = (" ".join(f"--{k.replace('_', '-')} {v}" for k, v in r.items()) for r in RECIPES.values())
    recipes = "\n".join(f"{name:5} {line}" for name, line in zip(RECIPES, lines))
    group = flags.add_argument_group("optimisation; by default", recipes)
    group.add_argument("--steps", type=whole, metavar="N", help="updates")
    group.add_argument(
        "--batch-size", type=whole, metavar="B", help="rows of a micro-batch; what memory allows"
    )
    group.add_argument("--seq-len", type=whole, metavar="T", help="tokens in a row")
    words = "tokens in a row of the first updates (Li et al. 2022); --seq-len if that is given"
    group.add_argument("--short-len", type=whole, metavar="T", help=words)
    group.add_argument("--short-steps", type=number(int, low=0), metavar="N", help="how many these are")
    group.add_argument("--total-batch-tokens", type=whole, metavar="N", help="tokens in an update")
    group.add_argument("--lr", type=some, metavar="X", help="highest learning rate")
    group.add_argument("--warmup-steps", type=number(int, low=0), metavar="N", help="steps up to it")
    group.add_argument(
        "--final-lr", type=number(float, 0, 1), default=0.0, metavar="X", help="at the end, times --lr"
    )
    group.add_argument(
        "--weight-decay", type=share, default=0.1, metavar="X", help="on matrices and embeddings"
    )
    group.add_argument(
        "--beta2", type=number(float, 0, 0.99999), default=0.95, metavar="X", help="AdamW's second"
    )
    group.add_argument(
        "--grad-clip", type=some, default=1.0, metavar="X", help="largest norm of the gradient"
    )
    group.add_argument(
        "--outlier-z", type=share, default=7.0, metavar="Z", help="leave out steps this far up; 0: none"
    )
    group = flags.add_argument_group("evaluation, samples, checkpoints (in steps; 0: never)")
    every = number(int, low=0)
    group.add_argument("--eval-every", type=every, default=200, metavar="N", help="evaluate, and at the end")
    group.add_argument(
        "--eval-tokens", type=whole, default=65536, metavar="N", help="validation tokens for that"
    )
    group.add_argument(
        "--sample-every", type=every, default=200, metavar="N", help="show a sample, and at the end"
    )
    group.add_argument("--sample-tokens", type=whole, default=100, metavar="N", help="its length")
    group.add_argument(
        "--save-every", type=every, default=200, metavar="N", help="write a checkpoint, and at the end"
    )
    group.add_argument("--keep", type=whole, default=2, metavar="N", help="checkpoints to keep, the newest")
    group = flags.add_argument_group("machine")
    group.add_argument(
        "--seed", type=number(int, 0, 2**63), default=42, metavar="N", help="weights and data order"
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    group.add_argument(
        "--dtype", choices=("float32", "float64", "bfloat16"), default="float32", help="of numbers"
    )
    group.add_argument(
        "--recompute", action="store_true", help="compute some activations twice: less memory, more time"
    )
    group.add_argument(
        "--dollars-per-hour", type=share, metavar="X", help="price of the machine, to show the cost"
    )
    group = flags.add_argument_group("a test of the machinery")
    group.add_argument(
        "--overfit-batch", action="store_true", help="train on one batch: its loss must go to 0"
    )
    return flags


def parse(argv):
    """The flags; with --resume those of the run's newest checkpoint, unless given anew."""
    flags, checkpoint = parser().parse_args(argv), None
    run = Path(flags.out)
    if flags.resume:
        checkpoint, before = runs.to_resume(run)
        again = parser()
        again.set_defaults(**before)
        flags = again.parse_args(argv)
        if flags.model != before["model"]:
            raise UserError(f"{run} is a run of --model {before['model']}; leave out --model {flags.model}")
    else:
        runs.require_new(run)
    plain = dict(short_len=flags.seq_len, short_steps=0) if flags.seq_len else {}
    for name, value in (RECIPES[flags.model] | plain).items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    rows, rest = divmod(flags.total_batch_tokens, flags.seq_len)
    if rest:
        raise UserError(
            f"--total-batch-tokens {flags.total_batch_tokens} is no multiple of --seq-len {flags.seq_len}"
        )
    if flags.seq_len % flags.short_len:
        raise UserError(f"--seq-len {flags.seq_len} is no multiple of --short-len {flags.short_len}")
    if flags.batch_size and rows % flags.batch_size:
        raise UserError(f"--batch-size {flags.batch_size} does not divide the {rows} rows of an update")
    return flags, checkpoint


def model_config(flags, tokenizer, source):
    """The sizes of the model: those of the checkpoint `source` if there is one, else what the flags say."""
    names = ("n_layer", "n_head", "n_embd", "n_positions")
    wanted = {name: getattr(flags, name) for name in names if getattr(flags, name)}
    if source:
        config = gpt2.read_config(source)
        for name, value in wanted.items():
            if value != getattr(config, name):
                flag = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{source} has {name} {getattr(config, name)}; leave out {flag}")
    else:
        usual = gpt2.PRESETS[flags.model] | {"n_positions": flags.seq_len if flags.model == "tiny" else 1024}
        config = gpt2.GPT2Config(**usual | wanted, vocab_size=tokenizer.vocab_size)
    P, V, n = config.n_positions, config.vocab_size, tokenizer.vocab_size
    if n != V:
        raise UserError(f"the model has {V} tokens, {flags.data} {n}; give the --data it was made for")
    if flags.seq_len > P:
        raise UserError(f"--seq-len {flags.seq_len} is more than the model's context of {P}; lower it")
    return config


def check_tokens(shards, vocab_size, at_most=1 << 28):
    """Refuse text of another tokenizer before the run; of very large data only the beginning is read."""
    for shard in shards:
        if at_most > 0 and shard.max() >= vocab_size:
            raise UserError(
                f"{shard.filename} has token {shard.max()}, but the vocabulary ends at {vocab_size - 1}"
            )
        at_most -= len(shard)


def main(argv=None):
    flags, checkpoint = parse(argv)
    run, T = Path(flags.out), flags.seq_len
    rows, start, state = flags.total_batch_tokens // T, 0, {}

    train_shards, val_shards = data.shards(flags.data, "train"), data.shards(flags.data, "val")
    tokenizer = Tokenizer.load(flags.data)
    check_tokens(train_shards + val_shards, tokenizer.vocab_size)
    batches = Windows(train_shards, T, rows, flags.seed)
    times = T // flags.short_len  # as many short rows as a long one has room for
    short = Windows(train_shards, flags.short_len, rows * times, flags.seed)
    source = checkpoint or (flags.init_from and runs.newest_checkpoint(flags.init_from))
    config = model_config(flags, tokenizer, source)
    device, flags.dtype = kernels.choose(flags.device, flags.dtype)
    ops, itemsize = kernels.load(device), {"bfloat16": 2, "float32": 4, "float64": 8}[flags.dtype]

    def memory(B):
        return config.memory(B, T, itemsize, flags.recompute, ops.LOGITS)

    def needed(B):
        return sum(memory(B).values())

    free = ops.free_memory() or 8e9
    most = max(1, ops.BATCH_TOKENS // T)
    flags.batch_size = B = flags.batch_size or fit(rows, needed, most, ops.SHARE * free)
    if needed(B) > free:
        what = f"training takes {console.size(needed(B))}, and {console.size(free)} are free"
        raise UserError(f"{what}; lower --batch-size {B}, use --recompute, or choose a smaller --model")
    if source:
        model = gpt2.GPT2.from_pretrained(source, device, flags.dtype, flags.recompute)
    else:
        model = gpt2.GPT2(config, device, flags.dtype, flags.seed, flags.recompute)
    team = workers.Workers(model, {"windows": share_of_windows})
    optimizer = gpt2.AdamW(model, betas=(0.9, flags.beta2), weight_decay=flags.weight_decay)
    if checkpoint:
        state = runs.read_state(checkpoint)
        start = state["step"]
        if start >= flags.steps:
            raise UserError(
                f"{run} has all its {flags.steps} steps; give more --steps, or see sample.py {run}"
            )
        optimizer.load(checkpoint / "optimizer.safetensors")
    z = 0 if flags.overfit_batch else flags.outlier_z  # the same batch again would be as far out again
    losses, norms = (Outliers(z, state.get(name, ())) for name in ("losses", "norms"))
    lengths = {True: flags.short_len, False: T}  # those that it is not trained on yet would say little
    validation = {
        early: list(evaluation_batches(val_shards, n, B * T // n, flags.eval_tokens))
        for early, n in lengths.items()
    }
    weights = ops.to_device(np.full((B, T), 1 / (rows * T), model.exact))

    def micro_batches():
        for step in itertools.count(start):
            for first in range(0, rows, B):
                if step < flags.short_steps and not flags.overfit_batch:
                    yield short.batch(step, first * times, B * times)
                else:
                    yield batches.batch(0 if flags.overfit_batch else step, first, B)

    def gradients(ready, n=rows // B):
        """Forward and backward over n micro-batches; return a function that waits for the loss. When the loss
        is there, a GPU still has the last backward pass to do."""
        if team.size > 1:
            total = sum(sum(team.run("windows", deal(*next(ready), rows * T, team.size))) for _ in range(n))
            team.add_gradients()
            return lambda: total / (rows * T)
        read = []
        for _ in range(n):
            tokens, targets = next(ready)
            read.append(ops.read_later(model.forward(tokens, targets, weights.reshape(tokens.shape))))
            model.backward()
        return lambda: sum(float(losses().sum(dtype=np.float64)) for losses in read) / (rows * T)

    peak = measured_peak(ops, model.type)
    for _ in range(2):  # the second is warm
        began = time.perf_counter()
        gradients(model.prefetch(micro_batches()), 1)()
        ops.synchronize()
        step_seconds = (time.perf_counter() - began) * (rows // B)
    model.flat_grads.fill(0)
    plan(flags, model.config, batches, rows * T, memory(B), step_seconds, peak)

    run.mkdir(parents=True, exist_ok=True)
    log, line, interrupt = runs.Log(run, start), console.Line(every=0), runs.Interrupt()
    log.write("start", step=start, parameters=model.config.n_params(), peak_flops=peak, flags=vars(flags))

    ready, ahead = model.prefetch(micro_batches()), None
    skipped, skipped_in_a_row = state.get("skipped", 0), 0
    for step in range(start, flags.steps):
        if not ahead:
            began, ahead = ops.now(), gradients(ready)
        if step == flags.short_steps:  # longer rows: what was usual says nothing any more
            losses, norms = Outliers(z), Outliers(z)
        lr = learning_rate(step, flags.steps, flags.lr, flags.warmup_steps, flags.final_lr)
        loss = ahead()
        loss_z, sound = losses.z(loss), losses.accepts(loss)
        norm = optimizer.update(lr, flags.grad_clip, norms.limit() if sound else -1)  # -1: leave it out
        ended, done, last = ops.now(), step + 1, step + 1 == flags.steps
        stopping = interrupt.asked and not last  # asked once: Ctrl-C may come between two questions
        due = [n and done % n == 0 for n in (flags.save_every, flags.eval_every, flags.sample_every)]
        # The next step begins before this one's norm is read: a GPU never waits for Python to read and write.
        ahead = gradients(ready) if model.device == "cuda" and not (last or stopping or any(due)) else None
        norm = norm()
        norm_z, sound = norms.z(norm), norms.accepts(norm) and sound
        skipped, skipped_in_a_row = skipped + (not sound), 0 if sound else skipped_in_a_row + 1

        seconds, began = ops.elapsed(began, ended), ended
        speed = rows * T / seconds
        utilization = speed * model.config.flops_per_token(T) / peak
        step_seconds += (seconds - step_seconds) / min(done - start, 50)
        left = duration(step_seconds * (flags.steps - done))
        line.show(
            f"step {done}/{flags.steps} | loss {loss:.4f} (z {loss_z:+.1f}) | "
            f"norm {norm:.3f} (z {norm_z:+.1f}) | "
            f"lr {lr:.2e} | {seconds * 1e3:.0f} ms | {count(speed)} tok/s | {utilization:.0%} of peak | "
            f"{left} left" + ("" if sound else " | SKIPPED")
        )
        values = dict(loss=loss, loss_z=loss_z, norm=norm, norm_z=norm_z, lr=lr, seconds=seconds)
        log.write("step", step=done, **values, speed=speed, utilization=utilization, skipped=not sound)
        if skipped_in_a_row == 10:
            raise UserError(
                f"10 steps in a row had a loss or gradient that is no number or far out, last {loss:.4g} and "
                f"{norm:.4g}; nothing was updated with them. Lower --lr and --resume, or start anew"
            )
        if last or stopping or due[0]:
            state = dict(
                skipped=skipped, losses=list(losses.values), norms=list(norms.values), flags=vars(flags)
            )
            place = runs.save_checkpoint(run, done, model, tokenizer, optimizer, flags.keep, **state)
            log.write("checkpoint", step=done, path=place.name)
        if stopping:
            line.clear()
            place = shlex.quote(str(run))
            console.say(f"stopped after step {done}; go on with: python train.py --out {place} --resume")
            raise SystemExit(130)
        if last or due[1]:
            val_loss, bits = evaluate(model, validation[done <= flags.short_steps], tokenizer.token_lengths)
            line.clear(f"step {done}: validation loss {val_loss:.4f}, {bits:.4f} bits per byte")
            log.write("eval", step=done, loss=val_loss, bits_per_byte=bits)
        if last or due[2]:
            text = continuation(model, tokenizer, flags.sample_tokens, seed=done)
            line.clear(f"step {done}, a sample:\n{text}\n")
            log.write("sample", step=done, text=text)
    line.clear(f"done: {place}, {skipped} steps left out; talk to it: python sample.py {run} --prompt 'The'")


if __name__ == "__main__":
    console.run(main)
