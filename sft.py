"""Supervised finetuning: train.py's loop on conversations, and a model that continues text is an assistant.

    python sft.py --init-from runs/factbook --out runs/sft     learn from the mixture of conversations
    python sft.py --show 5                                     print conversations as the model reads them

A conversation is one flat stream of tokens (tokenizer.py), and only what the assistant must say is a target:
its words, its tool calls and the token that ends its turn. The loss is that of train.py with the weights
1 / (number of targets) there and 0 elsewhere.

`make sft` does it twice. The first assistant is asked every factual question (evaluate.py --probe), and what
it does not know becomes, for the second, a question whose right answer is "I don't know". Read train.py and
tokenizer.py first, rl.py next; tasks/conversations.py makes the conversations.
"""

import functools
import itertools
from collections import Counter

import numpy as np

import common
import distributed
import evaluate
import gpt2
import hub
import kernels
from common import Run, UserError, add_shared_flags, count, number
from tasks.conversations import DEFAULT, draw_chats, reasons
from tokenizer import Tokenizer
from train import describe_recipes, learning_rate, use_recipe

UNKNOWN = 2  # the share of questions about facts that the probe found unknown
TOO_LONG = "too long before the assistant speaks"  # why a conversation is left out
PASS_COST = 128  # fixed cost of a forward and a backward pass, in tokens; tiny model, 2 cores


def main(argv=None):
    flags, checkpoint = parse(argv)
    if flags.show:
        return show(flags)
    run = Run("sft.py", flags, checkpoint, stage="sft")

    # The other ranks, which read the conversations at the same time
    source = checkpoint or hub.find_checkpoint(flags.init_from)
    config = gpt2.read_config(source)
    device, flags.dtype = kernels.choose(flags.device, flags.dtype, on_gpu=ON_GPU[recipe_name(config)])
    flags.ranks = distributed.choose_ranks(flags.ranks, config.n_params(), device, flags.batch_size)
    world = distributed.start(flags.ranks, __file__, argv)

    # The conversations, as tokens and masks
    base_tokenizer = Tokenizer.load(source)
    tokenizer = base_tokenizer.with_chat_tokens()
    rows, held_out, left_out = load_conversations(flags, tokenizer, config.n_positions)
    loader = DataLoader(rows, flags, config.n_positions)

    # The model, the same on every rank
    sizes = dict(own_tokens=base_tokenizer.vocab_size, vocab_size=tokenizer.vocab_size)
    model = gpt2.GPT2.from_pretrained(source, device, flags.dtype, **sizes)
    model.share(world)
    optimizer = gpt2.AdamW(model, weight_decay=flags.weight_decay, world=world)
    run.begin(world, model, optimizer, tokenizer, loader.n_steps, conversations=len(rows), left_out=left_out)
    print_plan(run, rows, left_out)

    for step in run.steps():
        for tokens, targets, weights in loader.micro_batches(step, world):  # (B, T) each
            model.forward(tokens, targets, weights)
            model.backward()
        world.all_reduce(model.sums)
        lr = learning_rate(step, loader.n_steps, flags.lr, flags.warmup_steps, flags.final_lr)
        optimizer.step(lr, flags.grad_clip, *run.limits(step))
        run.report(step, lr, tokens=loader.n_tokens(step))

        done = step + 1
        if run.is_due(done, flags.eval_every):
            loss = held_out_loss(model, held_out, flags.batch_tokens, world)
            run.say(f"step {done}: loss on held-out conversations {loss:.4f}")
            run.log("eval", step=done, loss=loss)
        if run.is_due(done, flags.exam_every) and done < loader.n_steps:
            results = evaluate.evaluate(model, tokenizer, n=20, world=world)
            run.say(evaluate.line(results))
            run.log("exam", step=done, results=results)

    run.say(
        f"done: {run.checkpoint_path(loader.n_steps)}; talk to it: python sample.py {run.directory} --chat"
    )


# ------------------------------------------------------------------------------------------------------------
# Conversations become rows: (tokens, mask), two arrays of one length


def load_conversations(flags, tokenizer, n_positions):
    """Rows to train on, held-out rows, and {why a conversation was left out or shortened: how many}.

    Conversations become rows one by one, so that a set of 460,000 is never in memory as text.
    """
    spec = flags.data
    if flags.known:
        spec += f",unknown:{flags.known}={UNKNOWN}"
    longest, dropped = n_positions + 1, Counter()  # the last token is a target and no input
    seed, skip_bad, length = flags.seed, flags.skip_bad, functools.partial(n_tokens, tokenizer)
    train = draw_chats(spec, flags.examples, dropped, seed, "train", skip_bad, length, n_positions)
    test = draw_chats(spec, 600, Counter(), seed, "test", skip_bad, length, n_positions)
    rows, shortened = prepare(tokenizer, train, longest)
    held_out, _ = prepare(tokenizer, test, longest)
    left_out = {**dropped, **shortened}
    if len(rows) < flags.batch_size:
        what = f"{len(rows)} conversations are fewer than --batch-size {flags.batch_size}"
        raise UserError(f"{what}; give more; left out or shortened: {reasons(left_out)}")
    return rows, held_out, left_out


def n_tokens(tokenizer, turns):
    """How many tokens some turns are, without the one that begins a document."""
    return len(tokenizer.render(turns)[0]) - 1


def prepare(tokenizer, conversations, longest):
    """[(tokens, mask)] of at most `longest` tokens each, and {"shortened" or TOO_LONG: how many}.

    A conversation that is too long loses its last turns. If nothing is left for the assistant to say, the
    conversation is left out.
    """
    rows, counts = [], {"shortened": 0, TOO_LONG: 0}
    end_of_turn = tokenizer.encode_special("<|im_end|>")
    dtype = np.min_scalar_type(tokenizer.vocab_size)  # uint16 as a rule: a set may have 400M tokens
    for conversation in conversations:
        tokens, mask = tokenizer.render(conversation)
        tokens, mask = np.array(tokens, dtype), np.array(mask, bool)  # (T,) each
        ends = np.flatnonzero(tokens == end_of_turn) + 1  # (turns,)
        n = int(ends[ends <= longest].max(initial=0))
        if not mask[:n].any():
            counts[TOO_LONG] += 1
            continue
        counts["shortened"] += n < len(tokens)
        rows.append((tokens[:n].copy(), mask[:n].copy()))  # a slice would keep the rest in memory
    return rows, counts


class DataLoader:
    """The batch of every step: --batch-size conversations, a pure function of seed and step.

    Every epoch has all conversations in another random order, without those that do not fill a batch.
    """

    def __init__(self, rows, flags, n_positions):
        self.all_rows, self.flags, self.n_positions = rows, flags, n_positions
        self.steps_per_epoch = len(rows) // flags.batch_size
        self.n_steps = self.steps_per_epoch * flags.epochs
        self._order = functools.lru_cache(maxsize=1)(self._make_order)

    def _make_order(self, epoch):
        return np.random.default_rng([self.flags.seed, epoch]).permutation(len(self.all_rows))

    def rows(self, step):
        """[(tokens, mask)] of a step, of all ranks."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        size = self.flags.batch_size
        return [self.all_rows[i] for i in self._order(epoch)[batch * size : (batch + 1) * size]]

    def n_tokens(self, step):
        """How many tokens a step trains on, prompts included."""
        return sum(len(tokens) for tokens, _ in self.rows(step))

    def micro_batches(self, step, world):
        """Yield this rank's tokens, targets and weights, (B, T) each; the weights are 1 / (number of targets)
        of all ranks."""
        rows = weighted(self.rows(step))
        yield from micro_batches(share(rows, world), self.flags.batch_tokens, self.n_positions)


def weighted(rows):
    """Rows with weights for masks: with 1 / (number of targets) the sum of the losses is their mean."""
    n_targets = sum(int(mask[1:].sum()) for _, mask in rows)
    return [(tokens, mask / n_targets) for tokens, mask in rows]


def share(rows, world):
    """This rank's part of some rows: every size-th by length, so that all ranks have as much to do."""
    return sorted(rows, key=row_length)[world.rank :: world.size]


def row_length(row):
    """The number of tokens of a row (tokens, weights)."""
    return len(row[0])


def micro_batches(rows, most_tokens, n_positions):
    """Yield tokens, targets and weights, (B, T) each, of rows (tokens, weights) of any length.

        row      a  b  c  d  e            weights[t] is how much predicting token t counts
        tokens   a  b  c  d  0  0  0  0   what the model reads, with padding up to T, a multiple of 8
        targets  b  c  d  e  0  0  0  0   what it is to predict; the padding has the weight 0

    No row sees another: each has a line of its own, with the padding behind it, where causal attention never
    looks. B T is at most most_tokens if a row allows; rows without any weight are left out.

    Rows are taken by length, the longest first. A micro-batch ends where it is full, or where the padding
    that all shorter rows would need from here on costs more than one more pass. (The best cuts, which dynamic
    programming finds, would save 5% of the work on batches of 16 single conversations.)
    """
    rows = sorted((row for row in rows if np.any(row[1][1:])), key=row_length, reverse=True)
    lengths = [min(-(-(row_length(row) - 1) // 8) * 8, n_positions) for row in rows]  # multiples of 8
    start = 0
    for end in range(1, len(rows) + 1):
        T = lengths[start]
        if end < len(rows):
            is_full = (end - start + 1) * T > most_tokens
            padding = (len(rows) - end) * (T - lengths[end])
            if not is_full and padding <= PASS_COST:
                continue
        yield padded(rows[start:end], T)
        start = end


def padded(rows, T):
    """tokens and targets (B, T) int32 and weights (B, T) of B rows that have at most T + 1 tokens."""
    B = len(rows)
    tokens, targets = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    weights = np.zeros((B, T))
    for b, (ids, row_weights) in enumerate(rows):
        n = len(ids) - 1
        tokens[b, :n], targets[b, :n], weights[b, :n] = ids[:-1], ids[1:], row_weights[1:]
    return tokens, targets, weights


def held_out_loss(model, rows, most_tokens, world):
    """The mean loss, in nats, of what the assistant must say, by all ranks."""
    pending = []
    mine = share(weighted(rows), world)
    for tokens, targets, weights in micro_batches(mine, most_tokens, model.config.n_positions):
        pending.append((model.ops.read_later(model.losses(tokens, targets)), weights))  # (B, T) each
    loss = sum(float((read_losses() * weights).sum()) for read_losses, weights in pending)
    return sum(world.gather(loss))


# ------------------------------------------------------------------------------------------------------------
# What a person sees


def print_plan(run, rows, left_out):
    """What the run learns from."""
    if run.world.rank:
        return
    flags = run.flags
    n_tokens = sum(len(tokens) for tokens, _ in rows)
    n_targets = sum(int(mask.sum()) for _, mask in rows)
    share_of_targets = n_targets / n_tokens
    print(f"data      {len(rows)} conversations, {count(n_tokens)} tokens, {share_of_targets:.0%} targets")
    print(f"          left out or shortened: {reasons(left_out)}")
    print(
        f"training  {run.n_steps} steps of {flags.batch_size} conversations, each seen {flags.epochs} times"
    )


def show(flags):
    """Print --show conversations as one flat stream; the targets are bright, or stand between brackets."""
    tokenizer = Tokenizer.load(hub.find_checkpoint(flags.init_from)).with_chat_tokens()
    length, longest = functools.partial(n_tokens, tokenizer), config_of(flags, None).n_positions
    n = 6 * flags.show  # since a chat joins up to six conversations
    chats = draw_chats(flags.data, n, Counter(), flags.seed, "train", flags.skip_bad, length, longest)
    for conversation in itertools.islice(chats, flags.show):
        tokens, mask = tokenizer.render(conversation)
        print(f"{marked(tokenizer, tokens, mask)}\n({len(tokens)} tokens, {sum(mask)} of them targets)\n")


def marked(tokenizer, tokens, mask):
    """The text of tokens, with marks around those whose mask is 1."""
    begin, end = ("\033[1;32m", "\033[0m") if common.colour() else ("[", "]")
    text, before = "", 0
    for token, is_target in zip(tokens, mask):
        if is_target != before:
            text += begin if is_target else end
        text += tokenizer.decode([token])
        before = is_target
    return text + (end if before else "")


# ------------------------------------------------------------------------------------------------------------
# The command line

# What a larger model learns from: smol-smoltalk, and what our assistant has besides: a name, tools, refusals.
CHAT = "smoltalk:hub=85,gsm8k:hub=2,tools=4,spelling=2,counting=1,multi-turn=1,identity=2,refusal=1,unknown=2"
# Defaults of the flags by the size of --init-from. tiny was tried out here, d12 was not: it has the batch,
# the epochs and the warm-up (a tenth of the steps) with which SmolLM2-135M learned from smol-smoltalk, and
# half of pretraining's learning rate (theirs was 1e-3).
RECIPES = {
    "tiny": dict(
        data=DEFAULT, examples=40000, epochs=1, batch_size=8, batch_tokens=8192, lr=3e-3, warmup_steps=50
    ),
    "d12": dict(
        data=CHAT, examples=480000, epochs=2, batch_size=128, batch_tokens=16384, lr=3e-4, warmup_steps=750
    ),
}
ON_GPU = {"tiny": "float32", "d12": "bfloat16"}  # the --dtype on a GPU
EXPECTATION = """
What to expect of a model of GPT-2's size (d12, 124M parameters): fluent answers of a few sentences that keep
to the subject, with many wrong facts. Of GSM8K's problems it solves 0 to 3%: others report 0.2 to 3.3% at
this size, and these settings were not tried out yet. It learns the form of a solution and when to call the
calculator, hardly the reasoning. rl.py starts from there.
"""


def parser():
    flags = common.Parser(prog="sft.py", description=__doc__, epilog=EXPECTATION)
    whole, steps = number(int, low=1), number(int, low=0)
    group = flags.add_argument_group("model and data")
    add_shared_flags(group, "init-from", "out", "resume", init_from="runs/factbook", out="runs/sft")
    add = group.add_argument
    what = "sources with their shares, as in factbook=3,tasks=2; also jsonl:PATH, smoltalk:PATH, gsm8k:PATH"
    what += "; with hub as its PATH a set is downloaded"
    add("--data", metavar="SPEC", help=what)
    what = "what evaluate.py --probe wrote: teach it to say that it does not know the rest"
    add("--known", metavar="PATH", help=what)
    what = "leave out the bad lines of jsonl:PATH and the bad rows of smoltalk:PATH, and count them"
    add("--skip-bad", action="store_true", help=what)
    what = "instead of training, print N conversations as the model reads them"
    add("--show", type=whole, help=what)

    what = "optimisation; by default, for a model of up to 17M parameters and for a larger one"
    group = flags.add_argument_group(what, describe_recipes(RECIPES))
    group.add_argument("--examples", type=whole, help="conversations to draw")
    group.add_argument("--epochs", type=whole, help="how often each is seen")
    group.add_argument("--batch-size", type=whole, help="conversations in an update")
    names = "batch-tokens", "lr", "warmup-steps", "final-lr", "weight-decay", "grad-clip"
    add_shared_flags(group, *names)

    group = flags.add_argument_group("evaluation and checkpoints (in steps; 0: never)")
    what = "steps between losses on held-out conversations"
    group.add_argument("--eval-every", type=steps, default=500, help=what)
    what = "steps between short evaluations of what it can do"
    group.add_argument("--exam-every", type=steps, default=1000, help=what)
    add_shared_flags(group, "save-every", "keep", save_every=500)

    add_shared_flags(flags.add_argument_group("machine"), "ranks", "seed", "device", "dtype")
    return flags


def parse(argv):
    """The flags, with the recipe's values where none are given, and the checkpoint to go on from or None."""
    flags, checkpoint = common.parse_run(parser(), argv, "sft.py")
    use_recipe(flags, RECIPES[recipe_name(config_of(flags, checkpoint))])
    return flags, checkpoint


def config_of(flags, checkpoint):
    """The sizes of the model that a run begins or goes on with."""
    return gpt2.read_config(checkpoint or hub.find_checkpoint(flags.init_from))


def recipe_name(config):
    """The name of the recipe for a model of this size."""
    return "tiny" if config.n_params() <= distributed.SMALL else "d12"


if __name__ == "__main__":
    common.run(main)
