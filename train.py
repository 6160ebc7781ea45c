"""Pretraining: text becomes a model that continues text.

    python train.py --data shards/factbook --out runs/factbook            what `make train` does
    python train.py --data shards/factbook --out runs/factbook --resume   go on after Ctrl-C, bit for bit
    python train.py --model d12 --plan --gpus 8xH100                      what that run takes, without a GPU
    python -m extras.plot runs/factbook                                   draw its loss and learning rate

main() is the training loop: micro-batches, forward, backward, the sum over all ranks, the update, the report.
sft.py and rl.py have the same loop on other data. Read gpt2.py first, which is the model, and sample.py next.
data.py, which made the shards, and distributed.py, by which several processes share a step, can wait. Run in
common.py writes log and checkpoints, and ends the loop when you press Ctrl-C.
"""

import bisect
import functools
import math
import textwrap
import time
from pathlib import Path
from statistics import fmean

import numpy as np

import common
import data
import distributed
import gpt2
import hub
import kernels
from common import Run, UserError, add_shared_flags, count, duration, number, size
from evaluate import hellaswag, hellaswag_text, read_hellaswag
from sample import generate
from tokenizer import Tokenizer, visible


def main(argv=None):
    flags, checkpoint = parse(argv)
    if flags.plan or flags.choose:
        from extras import plan  # noqa: PLC0415  the course can do without

        return plan.show(flags) if flags.plan else plan.choose(flags)
    run = Run("train.py", flags, checkpoint)

    # The text
    tokenizer = Tokenizer.load(flags.data)
    train_shards, val_shards = data.shards(flags.data, "train"), data.shards(flags.data, "val")
    check_tokens(train_shards + val_shards, tokenizer.vocab_size)
    loader = DataLoader(train_shards, flags)

    # The model, the same on every rank
    source = checkpoint or (flags.init_from and hub.find_checkpoint(flags.init_from))
    config = model_config(flags, tokenizer, source)
    device, flags.dtype = kernels.choose(flags.device, flags.dtype, on_gpu="bfloat16")
    rows = flags.total_batch_tokens // flags.seq_len
    flags.ranks = distributed.choose_ranks(flags.ranks, config.n_params(), device, rows)
    world = distributed.start(flags.ranks, __file__, argv)
    memory = choose_batch_size(flags, config, kernels.load(device), world, one_memory=device != "cuda")
    hellaswag_items = load_hellaswag(flags, device, tokenizer, config.n_positions)
    validation = {T: validation_batches(val_shards, T, flags) for T in (flags.short_len, flags.seq_len)}
    model = make_model(source, config, device, flags)
    model.share(world, zero=flags.zero == 1)
    optimizer = gpt2.AdamW(model, (0.9, flags.beta2), weight_decay=flags.weight_decay, world=world)
    plan_run(run, flags, model, optimizer, loader, world, memory)
    run.begin(world, model, optimizer, tokenizer, flags.steps, parameters=config.n_params(), peak=run.peak)
    before = None if run.start or world.rank else right_tokens(model, loader, world)

    for step in run.steps():
        for tokens, targets, weights in run.until_stopped(step, loader.micro_batches(step, world)):  # (B, T)
            model.forward(tokens, targets, weights)
            model.backward()
        world.all_reduce(model.sums)
        lr = learning_rate(step, flags.steps, flags.lr, flags.warmup_steps, flags.final_lr)
        since = loader.n_short if step >= loader.n_short else 0  # compare rows of one length
        optimizer.step(lr, flags.grad_clip, *run.limits(step, since))
        run.report(step, lr, tokens=flags.total_batch_tokens)
        if step == 0 and world.rank == 0:
            report_first_update(run, loader, before, right_tokens(model, loader, world))

        done = step + 1
        run.save_if_due(done)  # before anything that may fail
        if run.is_due(done, flags.eval_every):
            batches = validation[loader.row_length(step)]
            loss, bits_per_byte = evaluate(model, batches, tokenizer.token_lengths, world)
            run.say(f"step {done}: validation loss {loss:.4f}, {bits_per_byte:.4f} bits per byte")
            run.log("eval", step=done, loss=loss, bits_per_byte=bits_per_byte)
        if run.is_due(done, flags.hellaswag_every):
            report_hellaswag(run, done, hellaswag_items)
        if run.is_due(done, flags.sample_every) and world.rank == 0:
            text = write_document(model, tokenizer, flags.sample_tokens, seed=done)
            run.say(f"step {done}, a sample:\n{common.printable(text)}\n")
            run.log("sample", step=done, text=text)

    run.say(f"done: {run.checkpoint_path(flags.steps)}, {run.skipped} steps left out")
    run.say(f"let it continue a text: python sample.py {run.directory} --prompt 'The'")


# ------------------------------------------------------------------------------------------------------------
# Data loader


class DataLoader:
    """The batch of every step: rows of T tokens and their targets, a pure function of seed and step.

    So there is nothing to save, and another number of ranks or another micro-batch changes nothing. An epoch
    goes through the shards in a random order, cuts each into windows of T + 1 tokens, from another offset
    every time, and shuffles the windows of a shard. The rows of the first n_short steps, which are
    --short-part of all, have --short-len tokens.
    """

    def __init__(self, shards, flags):
        self.flags = flags
        self.windows = {T: Windows(shards, T, flags.seed) for T in (flags.seq_len, flags.short_len)}

    @property
    def n_short(self):
        """The number of steps with short rows; not fixed, because --hours sets --steps later."""
        return round(self.flags.short_part * self.flags.steps)

    def row_length(self, step):
        """The row length T of a step."""
        return self.flags.short_len if step < self.n_short else self.flags.seq_len

    def micro_batches(self, step, world):
        """Yield this rank's part of a step's batch: tokens, targets int32 and weights, (B, T) each."""
        flags, T = self.flags, self.row_length(step)
        windows = self.windows[T]
        rows = flags.total_batch_tokens // T  # of the whole batch
        first = 0 if flags.overfit_batch else step * rows
        mine = range(first + world.rank, first + rows, world.size)
        B = flags.batch_size * flags.seq_len // T  # as many tokens in a micro-batch, however long the rows
        for start in range(0, len(mine), B):
            places = [windows.locate(i) for i in mine[start : start + B]]
            for shard, _ in places:
                if isinstance(shard, data.LateShard):
                    shard.wait(world)
            block = np.stack([shard[i : i + T + 1] for shard, i in places]).astype(np.int32)  # (B, T + 1)
            weights = np.full((len(block), T), 1 / flags.total_batch_tokens)
            yield block[:, :-1], block[:, 1:], weights


class Windows:
    """Windows of T + 1 tokens, numbered from the beginning of training through all epochs."""

    def __init__(self, shards, T, seed):
        self.shards, self.T, self.seed = [shard for shard in shards if len(shard) > T], T, seed
        if not self.shards:
            raise too_short("the text", shards, T)
        self.counts = [max(1, len(shard) // T - 1) for shard in self.shards]  # with room for the offset
        self.n_windows = sum(self.counts)
        # locate() asks for both orders again for every window.
        self._window_order = functools.lru_cache(maxsize=2)(self._make_window_order)
        self._shard_order = functools.lru_cache(maxsize=2)(data.shard_order)

    def _make_window_order(self, epoch, k):
        """Offset and order of the windows of shard k in an epoch."""
        rng = np.random.default_rng([self.seed, epoch, k])
        offset = int(rng.integers(len(self.shards[k]) - self.counts[k] * self.T))
        return offset, rng.permutation(self.counts[k])

    def locate(self, i):
        """The shard that window i is in, and where it begins there."""
        epoch, i = divmod(i, self.n_windows)
        for k in self._shard_order(self.seed, epoch, len(self.shards)):
            if i < self.counts[k]:
                offset, order = self._window_order(epoch, k)
                return self.shards[k], offset + int(order[i]) * self.T
            i -= self.counts[k]


def learning_rate(step, steps, lr, warmup_steps, final):
    """The rate of update `step`, from 0: linear warm-up, half a cosine to final * lr (GPT-3, appendix B)."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def too_short(what, shards, T):
    """The UserError that says why no shard has a row of T tokens and their targets."""
    lengths = [len(shard) for shard in shards]
    if sum(lengths) <= T:
        return UserError(
            f"{what} has {sum(lengths)} tokens, --seq-len {T} needs {T + 1}; add text or lower it"
        )
    what = f"{what} is in {len(lengths)} shards of at most {max(lengths)} tokens, --seq-len {T} needs {T + 1}"
    return UserError(f"{what} in one; lower it, or make larger shards with data.py --shard-tokens")


# ------------------------------------------------------------------------------------------------------------
# What one update does: the right tokens become more probable, and so all the others less


def right_tokens(model, loader, world):
    """The probability that the model gives to every right token of the first row of training, (T,)."""
    tokens, targets, _ = next(loader.micro_batches(0, world))  # (B, T)
    losses = model.losses(tokens[:1], targets[:1])  # (1, T): minus the logarithms of the probabilities
    return np.exp(-model.ops.to_host(losses)[0].astype(np.float64))


def report_first_update(run, loader, before, after):
    """Say and log what the first update did to the right tokens of a row; one of median change is shown.

    before and after (T,) are their probabilities. The row is one of many in the batch, so some of its tokens
    may become less probable.
    """
    if np.array_equal(before, after):
        return  # the step was left out
    i = int(np.argsort(after / before)[len(before) // 2])
    tokens, targets, _ = next(loader.micro_batches(0, run.world))
    bytes_of = run.tokenizer.token_bytes
    context = visible(b"".join(bytes_of(int(token)) for token in tokens[0, max(0, i - 7) : i + 1]))
    right, n_more = visible(bytes_of(int(targets[0, i]))), int(np.sum(after > before))
    run.say(
        f'step 1, one update: "{right}" after "{context}" {before[i]:.4%} -> {after[i]:.4%}, the others '
        f"{1 - before[i]:.4%} -> {1 - after[i]:.4%}; {n_more} of {len(before)} right tokens rose"
    )
    values = dict(right=right, context=context, before=before[i], after=after[i])
    run.log("update", step=1, more_probable=n_more, of=len(before), **values)


# ------------------------------------------------------------------------------------------------------------
# Validation and samples


def validation_batches(shards, T, flags):
    """[(tokens, targets), ...], (up to B, T) each, from the beginning of the validation text, in order."""
    windows = [s[i : i + T + 1] for s in shards for i in range(0, len(s) - T, T)]
    if not windows:
        raise too_short("the validation text", shards, T)
    windows = windows[: max(1, flags.eval_tokens // T)]
    B = flags.batch_size * flags.seq_len // T
    blocks = [np.stack(windows[i : i + B]).astype(np.int32) for i in range(0, len(windows), B)]
    return [(block[:, :-1], block[:, 1:]) for block in blocks]


def evaluate(model, batches, token_lengths, world):
    """(mean loss in nats a token, bits per byte of text) over batches of tokens and targets, by all ranks."""
    losses, n_tokens, n_bytes = [], 0, 0
    for tokens, targets in batches[world.rank :: world.size]:
        losses.append(model.ops.read_later(model.losses(tokens, targets)))  # (B, T)
        n_tokens += targets.size
        n_bytes += int(token_lengths[targets].sum())
    nats = sum(float(read().sum(dtype=np.float64)) for read in losses)
    nats, n_tokens, n_bytes = map(sum, zip(*world.gather([nats, n_tokens, n_bytes])))
    return nats / n_tokens, nats / math.log(2) / max(n_bytes, 1)


def load_hellaswag(flags, device, tokenizer, n_positions):
    """The items of HellaSwag, None if they are not evaluated. Sets --hellaswag-every where it is not given.

    It is on for d12 and larger models on a GPU, if `evaluate.py --hellaswag hub` or the Makefile has fetched
    HellaSwag before.
    """
    if flags.hellaswag_every is None:
        is_wanted = device == "cuda" and flags.model != "tiny" and hub.is_fetched("hellaswag", "test")
        flags.hellaswag_every = 250 if is_wanted else 0
    return read_hellaswag("hub", tokenizer, n_positions) if flags.hellaswag_every else None


def report_hellaswag(run, done, items):
    """Evaluate HellaSwag after `done` steps, by all ranks; say and log the result."""
    results = hellaswag(run.model, items, run.world)
    run.say(f"step {done}: {hellaswag_text(results)}")
    run.log("hellaswag", step=done, **results)


def write_document(model, tokenizer, n, seed):
    """A document that the model writes from its first token on, of up to n tokens (sample.py)."""
    [completion] = generate(
        model, [[tokenizer.eot]], n, temperature=0.7, top_p=0.9, seed=seed,
        stop_tokens={tokenizer.eot}, tokenizer=tokenizer,
    )  # fmt: skip
    return completion.text


# ------------------------------------------------------------------------------------------------------------
# Before the run: does it fit, and how long will it take?


def model_config(flags, tokenizer, source):
    """The sizes of the model: those of the checkpoint `source` if there is one, else what the flags say."""
    names = ("n_layer", "n_head", "n_embd", "n_positions")
    wanted = {name: getattr(flags, name) for name in names if getattr(flags, name)}
    if source:
        config = gpt2.read_config(source)
        if (source / "tokenizer.json").exists() and Tokenizer.load(source).ranks != tokenizer.ranks:
            raise UserError(
                f"{flags.data} has another vocabulary than {source}; make shards with data.py "
                f"--tokenizer {source / 'tokenizer.json'}"
            )
        for name, value in wanted.items():
            if value != getattr(config, name):
                flag = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{source} has {name} {getattr(config, name)}; leave out {flag}")
    else:
        sizes = {**gpt2.PRESETS[flags.model], "n_positions": 1024, "vocab_size": tokenizer.vocab_size}
        if flags.model == "tiny":
            sizes["n_positions"] = flags.seq_len
        config = gpt2.GPT2Config(**{**sizes, **wanted})
    P, V, n = config.n_positions, config.vocab_size, tokenizer.vocab_size
    if n != V:
        raise UserError(f"the model has {V} tokens, {flags.data} {n}; give the --data it was made for")
    if flags.seq_len > P:
        raise UserError(f"--seq-len {flags.seq_len} is more than the model's context of {P}; lower it")
    return config


def make_model(source, config, device, flags):
    """The model of a checkpoint, or one with random parameters."""
    if source:
        return gpt2.GPT2.from_pretrained(source, device, flags.dtype, flags.recompute)
    return gpt2.GPT2(config, device, flags.dtype, flags.seed, flags.recompute)


def check_tokens(shards, vocab_size):
    """Refuse text of another tokenizer before the run; of very large data only the beginning is read."""
    unread = 1 << 28  # tokens that are still to be checked
    for shard in shards:
        if isinstance(shard, data.LateShard):
            continue  # it will be compared with its checksum when it comes
        if unread > 0 and shard.max() >= vocab_size:
            raise UserError(
                f"{shard.filename} has token {shard.max()}, but the vocabulary ends at {vocab_size - 1}"
            )
        unread -= len(shard)


def choose_batch_size(flags, config, ops, world, one_memory):
    """Set --batch-size, the rows of a micro-batch, to the most that fit; return {what: bytes}.

    The ranks of a CPU share one memory, and {what: bytes} is for all of them; on GPUs each has its own. All
    ranks decide the same, by the least free memory of any rank. UserError if --batch-size does not fit, or
    without that not even one row.
    """
    T, rows = flags.seq_len, flags.total_batch_tokens // flags.seq_len // flags.ranks
    free = min(world.gather(ops.free_memory() or 8e9))

    def needed(B):
        itemsize = np.dtype(flags.dtype).itemsize
        parts = gpt2.memory(config, B, T, itemsize, flags.recompute, ops.LOGITS)
        if one_memory:
            parts["gradients"] *= flags.ranks
            parts["activations"] *= flags.ranks
        elif flags.zero:
            master = 4 * config.n_params() if itemsize == 2 else 0
            parts["moments"] /= flags.ranks
            parts["parameters"] -= master * (1 - 1 / flags.ranks)
        return parts

    if flags.batch_size and flags.resume:  # another number of ranks may have other rows
        flags.batch_size = math.gcd(flags.batch_size, rows)
    if flags.batch_size and rows % flags.batch_size:
        raise UserError(f"--batch-size {flags.batch_size} does not divide the {rows} rows of a rank's update")
    if not flags.batch_size:
        flags.batch_size = 1
        for B in range(2, min(rows, ops.BATCH_TOKENS // T) + 1):
            if rows % B == 0 and sum(needed(B).values()) <= ops.SHARE * free:
                flags.batch_size = B
    memory = needed(flags.batch_size)
    total = sum(memory.values())
    if total > free:
        what = f"training takes {size(total)}, and {size(free)} are free"
        raise UserError(
            f"{what}; lower --batch-size {flags.batch_size}, use --recompute, or choose a smaller --model"
        )
    return memory


# FLOP/s without sparsity from the datasheets, by a part of the card's name; the first that fits counts.
DATASHEETS = {
    "H200": {"bfloat16": 989.5e12, "float32": 67e12},
    "H100 PCIe": {"bfloat16": 756e12, "float32": 51e12},
    "H100 NVL": {"bfloat16": 835e12, "float32": 60e12},
    "H100": {"bfloat16": 989.5e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "float32": 19.5e12},
    "L40S": {"bfloat16": 362e12, "float32": 91.6e12},
    "L4": {"bfloat16": 121e12, "float32": 30.3e12},
    "A10": {"bfloat16": 125e12, "float32": 31.2e12},
    "RTX 4090": {"bfloat16": 165.2e12, "float32": 82.6e12},
    "T4": {"float32": 8.1e12},
}


def peak_flops(model, world):
    """The peak FLOP/s of all ranks, which utilization is measured against, and what the report calls it.

    On a GPU whose datasheet is known it is the datasheet's (MFU), else what a large matrix product reaches.
    """
    if model.device == "cuda":
        for name, rates in DATASHEETS.items():
            if name in model.ops.card_name():
                return rates[model.dtype] * world.size, "MFU"
    return sum(world.gather(measured_flops(model.ops, model.type))), "of a matmul's rate"


def measured_flops(ops, dtype, n=128):
    """FLOP/s of a matrix product of n x n, where n doubles until the product takes 10 ms."""
    rng, best, c = np.random.default_rng(0), math.inf, ops.empty((n, n), dtype)
    a, b = (ops.to_device(rng.standard_normal((n, n), np.float32).astype(dtype)) for _ in range(2))
    for _ in range(5):
        start = time.perf_counter()
        ops.matmul_forward(c, a, b, None)
        ops.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best if best > 1e-2 or n == 4096 else measured_flops(ops, dtype, 2 * n)


def measure_steps(model, optimizer, loader, flags, world):
    """{row length T: seconds of a step}, the same on all ranks.

    One micro-batch is timed, after others that warm up, and taken times the micro-batches of a step. With
    --hours more of them are timed, for two seconds, and so are all-reduce and update; the parameters stay as
    they are, because the limits given to the update are below any norm. The gradients are cleared at the end.
    """
    times = {}
    n = flags.total_batch_tokens / (flags.batch_size * flags.seq_len * world.size)  # micro-batches of a step
    cold = 2 if model.device == "cuda" else 1  # rounds that warm up: a GPU records its graph in the second
    for step in sorted({0, loader.n_short}):
        rounds = []
        while len(rounds) <= cold or (flags.hours and sum(rounds[cold:]) < 2 * n):
            began = time.perf_counter()
            model.forward(*next(loader.micro_batches(step, world)))
            model.backward()
            model.ops.synchronize()
            seconds = (time.perf_counter() - began) * n
            if flags.hours:
                began = time.perf_counter()
                world.all_reduce(model.sums)
                optimizer.step(0.0, 1.0, -1.0, -1.0)
                model.ops.synchronize()
                seconds += time.perf_counter() - began
            rounds.append(max(world.gather(seconds)))
        times[loader.row_length(step)] = fmean(rounds[cold:])
    model.sums.fill(0)
    return times


def run_seconds(steps, flags, step_times):
    """How many seconds so many steps take, and the evaluations between them."""
    short = flags.short_part * steps
    seconds = short * step_times.get(flags.short_len, 0) + (steps - short) * step_times[flags.seq_len]
    # Evaluated tokens a step: they count a third, because forward is a third of forward and backward.
    evaluated = flags.eval_tokens / (3 * flags.eval_every) if flags.eval_every else 0
    return seconds * (1 + evaluated / flags.total_batch_tokens)


def steps_in(hours, flags, step_times):
    """How many steps so many hours have room for."""
    steps = bisect.bisect(range(1 << 40), hours * 3600, key=lambda n: run_seconds(n, flags, step_times)) - 1
    if steps < 1:
        raise UserError(f"one step takes {duration(run_seconds(1, flags, step_times))}; give more --hours")
    return steps


def plan_run(run, flags, model, optimizer, loader, world, memory):
    """Measure a step and the peak that it is compared with, set --steps from --hours, and print the plan."""
    run.flops_per_token = model.config.flops_per_token(flags.seq_len)
    run.peak, run.peak_is = peak_flops(model, world)
    step_times = measure_steps(model, optimizer, loader, flags, world)
    run.step_seconds = max(step_times.values())
    if flags.hours and not run.checkpoint:
        flags.steps = steps_in(flags.hours, flags, step_times)
    print_plan(flags, model, loader, world, run.peak, memory, step_times)


def print_plan(flags, model, loader, world, peak, memory, step_times):
    """Print what the run will take, and what others reached with such a run."""
    if world.rank:
        return
    config, tokens = model.config, flags.steps * flags.total_batch_tokens
    n, flops = config.n_params(), float(tokens * config.flops_per_token(flags.seq_len))
    sizes = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide"
    text_tokens = sum(map(len, loader.windows[flags.seq_len].shards))
    split = ", ".join(f"{what} {size(int(n_bytes))}" for what, n_bytes in memory.items())
    seconds = run_seconds(flags.steps, flags, step_times)
    cost = f", ${seconds / 3600 * flags.dollars_per_hour:.2f}" if flags.dollars_per_hour else ""
    ranks = f" on {world.size} ranks" if world.size > 1 else ""
    step_seconds = seconds / flags.steps
    print(f"model     {count(n)} parameters: {sizes};")
    print(f"          a vocabulary of {config.vocab_size}, a context of {config.n_positions}")
    print(f"data      {count(text_tokens)} tokens in {flags.data}, seen {tokens / text_tokens:.3g} times")
    print(f"training  {count(tokens)} tokens in {flags.steps} steps of {flags.total_batch_tokens}{ranks};")
    print(f"          {count(20 * n)} tokens would be compute-optimal (20 a parameter)")
    print(f"compute   {flops:.3g} FLOP (6 N D, and attention); the peak is {peak:.3g} FLOP/s")
    each = " a rank" if world.nccl else ""
    print(f"memory    {size(int(sum(memory.values())))}{each}: {split}")
    utilization = f"{flops / seconds / peak:.0%} utilization"
    print(f"time      {duration(seconds)}{cost}: {step_seconds * 1e3:.0f} ms a step, {utilization}")
    print(f"published {published(flags, Path(flags.data).name)}", flush=True)


# What others reached with the settings of RECIPES, by --model and the name of the data: steps, and results.
PUBLISHED = {
    ("d12", "fineweb"): (18865, "validation loss 3.27 to 3.29, HellaSwag 29.5 to 30 (llm.c's run)"),
    ("d12", "fineweb-edu"): (19073, "validation loss near 3.08, HellaSwag 29.7 (build-nanogpt's settings)"),
    ("d24", "fineweb"): (60000, "validation loss 2.93 (llm.c's run)"),
    ("d48", "fineweb-edu"): (32000, "better than OpenAI's XL near step 25,000 (llm.c's run)"),
}


def published(flags, data_name):
    """What others reached with these settings and the data of this name, or that no result is published."""
    steps, result = PUBLISHED.get((flags.model, data_name), (0, ""))
    same = all(getattr(flags, name) == RECIPES[flags.model][name] for name in ("lr", "total_batch_tokens"))
    if not result or not same:
        return "none has published a result with these settings and this data"
    return result if flags.steps >= 0.98 * steps else f"{result}, after {steps:,} steps"


# ------------------------------------------------------------------------------------------------------------
# The command line

# Short rows first: a model that learns to look back in short rows learns it sooner (Li et al. 2022).
SHORT_FIRST = dict(short_len=64, short_part=0.4)
NOT_SHORT = dict(seq_len=1024, short_len=1024, short_part=0.0, warmup_steps=700)
# llm.c's 20 batches of 8 GPUs with 64 rows: fewer tokens would give another loss than the one published.
EVALUATED = dict(eval_every=250, eval_tokens=10485760)
RECIPES = {  # defaults of the flags by --model: tiny was tried out here, the others are llm.c's and GPT-3's
    "tiny": dict(
        lr=3e-3,
        steps=10000,
        total_batch_tokens=1024,
        seq_len=256,
        warmup_steps=100,
        **SHORT_FIRST,
        eval_every=200,
        eval_tokens=65536,
    ),
    "d12": dict(lr=6e-4, steps=18865, total_batch_tokens=524288, **NOT_SHORT, **EVALUATED),
    "d24": dict(lr=3e-4, steps=18865, total_batch_tokens=524288, **NOT_SHORT, **EVALUATED),
    "d36": dict(lr=2.5e-4, steps=18865, total_batch_tokens=524288, **NOT_SHORT, **EVALUATED),
    "d48": dict(lr=6e-4, steps=32000, total_batch_tokens=1048576, **NOT_SHORT, **EVALUATED),
}


def describe_recipes(recipes):
    """A paragraph for each of some recipes, {model: {flag: default}}, for --help."""
    paragraphs = []
    for model, recipe in recipes.items():
        settings = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in recipe.items())
        text = f"{model:5} {settings}"
        lines = textwrap.wrap(text, 100, break_on_hyphens=False, break_long_words=False)
        paragraphs.append("\n      ".join(lines))
    return "\n".join(paragraphs)


def use_recipe(flags, recipe):
    """Give the flags that are None the values of a recipe, {flag: default}."""
    for name, value in recipe.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)


def parser():
    flags = common.Parser(prog="train.py", description=__doc__)
    whole, steps, share = number(int, low=1), number(int, low=0), number(float, low=0)
    group = flags.add_argument_group("data and output")
    group.add_argument("--data", default="shards/factbook", metavar="DIR", help="shards that data.py made")
    add_shared_flags(group, "out", "resume", "init-from", out="runs/factbook")

    group = flags.add_argument_group("model")
    group.add_argument("--model", choices=gpt2.PRESETS, default="tiny", help="a preset; d12 is GPT-2 small")
    for name, what in (("layer", "layers"), ("head", "heads"), ("embd", "channels")):
        group.add_argument(f"--n-{name}", type=whole, help=f"{what}, instead of the preset's")
    group.add_argument("--n-positions", type=whole, help="context; 1024, or --seq-len for tiny")

    group = flags.add_argument_group("optimisation; by default", describe_recipes(RECIPES))
    group.add_argument("--steps", type=whole, help="updates")
    what = "rows of a micro-batch; as many as memory allows"
    group.add_argument("--batch-size", type=whole, metavar="B", help=what)
    group.add_argument("--seq-len", type=whole, metavar="T", help="tokens in a row")
    what = "tokens in a row of the first updates; --seq-len if that is given"
    group.add_argument("--short-len", type=whole, metavar="T", help=what)
    what = "part of the updates, the first ones, with rows of --short-len"
    group.add_argument("--short-part", type=number(float, 0, 1), help=what)
    group.add_argument("--total-batch-tokens", type=whole, help="tokens in an update")
    add_shared_flags(group, "lr", "warmup-steps", "final-lr", "weight-decay", "grad-clip")
    what = "decay of the second moment (AdamW)"
    group.add_argument("--beta2", type=number(float, 0, 0.99999), default=0.95, help=what)
    what = "leave out a step whose loss or norm is so many standard deviations above the last ones; 0: none"
    group.add_argument("--outlier-z", type=share, default=7.0, metavar="Z", help=what)

    group = flags.add_argument_group("evaluation, samples, checkpoints (in steps; 0: never)")
    what = "steps between evaluations; there is one at the end"
    group.add_argument("--eval-every", type=steps, help=what)
    what = "tokens of the validation text that an evaluation reads, from its beginning"
    group.add_argument("--eval-tokens", type=whole, help=what)
    what = "steps between samples; there is one at the end"
    group.add_argument("--sample-every", type=steps, default=200, help=what)
    what = "steps between evaluations on HellaSwag; 250 for d12 and larger on a GPU, if it has been fetched"
    group.add_argument("--hellaswag-every", type=steps, help=what)
    group.add_argument("--sample-tokens", type=whole, default=100, help="length of a sample")
    add_shared_flags(group, "save-every", "keep", save_every=200)

    group = flags.add_argument_group("machine")
    add_shared_flags(group, "ranks", "seed", "device", "dtype")
    what = "compute some activations twice: less memory, more time"
    group.add_argument("--recompute", action="store_true", help=what)
    what = (
        "1: a GPU keeps the optimizer's state of its part of the parameters alone; ranks on a CPU always do"
    )
    group.add_argument("--zero", type=int, choices=(0, 1), default=0, help=what)

    add_time_flags(flags.add_argument_group("time and money"))
    group = flags.add_argument_group("a test of the machinery")
    what = "train on one batch only: its loss must go to 0"
    group.add_argument("--overfit-batch", action="store_true", help=what)
    return flags


def add_time_flags(group):
    """Flags on time and cost: a run can be limited by them, and a plan predicts them."""
    above = number(float, above=0)
    what = "as many steps as so much time has room for: one is measured first; checkpoints are not counted"
    group.add_argument("--hours", type=above, help=what)
    group.add_argument("--dollars", type=above, help="the same for so much money")
    what = "price of the machine, to show what the run costs"
    group.add_argument("--dollars-per-hour", type=number(float, low=0), help=what)
    what = "print memory, time and cost of such a run, and do not train; no GPU is needed"
    group.add_argument("--plan", action="store_true", help=what)
    group.add_argument(
        "--gpus", metavar="8xH100", help="for --plan: number and kind; by default this machine's"
    )
    what = "print the preset that this machine can train in a day, and why on standard error"
    group.add_argument("--choose", action="store_true", help=what)


def parse(argv):
    """The flags, with the recipe's values where none are given, and the checkpoint to go on from or None."""
    flags, checkpoint = common.parse_run(parser(), argv, "train.py")
    if flags.dollars:
        if not flags.dollars_per_hour:
            raise UserError("--dollars needs the price of the machine; give --dollars-per-hour")
        flags.hours = flags.dollars / flags.dollars_per_hour
    if checkpoint:
        before = common.read_state(checkpoint)["flags"]
        if flags.model != before["model"]:
            remedy = f"leave out --model {flags.model}"
            raise UserError(f"{flags.out} is a run of --model {before['model']}; {remedy}")
        if flags.short_part == before.get("short_part"):  # with more --steps long rows stay long
            flags.short_part = min(1.0, flags.short_part * before["steps"] / flags.steps)
        if flags.hours != before.get("hours"):
            remedy = "leave --hours and --dollars out, or give --steps"
            raise UserError(f"{flags.out} has its {before['steps']} steps already; {remedy}")
    elif flags.hours and flags.steps:
        raise UserError(f"--hours and --dollars set the number of steps; leave out --steps {flags.steps}")
    recipe = dict(RECIPES[flags.model])
    if flags.seq_len:  # one length for all rows, unless the short ones are asked for
        recipe.update(short_len=flags.seq_len, short_part=0.0)
    use_recipe(flags, recipe)
    if flags.overfit_batch:  # the one batch has long rows, and its loss is meant to be far from usual
        flags.short_part, flags.outlier_z = 0.0, 0.0
    if flags.total_batch_tokens % flags.seq_len:
        raise UserError(
            f"--total-batch-tokens {flags.total_batch_tokens} is no multiple of --seq-len {flags.seq_len}"
        )
    if flags.seq_len % flags.short_len:
        raise UserError(f"--seq-len {flags.seq_len} is no multiple of --short-len {flags.short_len}")
    return flags, checkpoint


if __name__ == "__main__":
    common.run(main)
