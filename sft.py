"""Supervised finetuning: the same algorithm on conversations, and a document completer becomes an assistant.

    python sft.py --init-from runs/factbook --out runs/sft           learn from the mixture of conversations
    python sft.py --show 5                                           what it learns from, as one flat stream
    python sft.py --probe runs/sft --to known.jsonl                  what does it know? ask everything 3 times
    python sft.py --eval runs/sft                                    the table of what it can do

`make sft` does it twice: the first assistant is asked every factual question, and what it does not know
becomes, for the second, a question whose right answer is "I don't know". Read sample.py (the format),
tasks/conversations.py (the conversations) and batches.py first, evaluate.py (probe and evaluation) and rl.py
next. The loss is train.py's; only the weights differ: 1 / targets on what the assistant must say, 0
elsewhere.
"""

import shlex
import time
from pathlib import Path

import numpy as np

import batches
import common
import distributed
import evaluate
import gpt2
import kernels
import tasks.conversations as mixture
from common import UserError, count, duration, number
from tokenizer import Tokenizer
from train import learning_rate

UNKNOWN = 2  # share, in percent of the mixture, of questions that a probe found it cannot answer

# ------------------------------------------------------------------------------------------------------------
# Conversations as tokens and weights


def prepare(tokenizer, conversations, longest):
    """[(tokens, mask)] of what fits `longest` tokens, and {what was done to the rest: how often}.

    What is too long loses its last turns; what then has nothing for the assistant to say is left out.
    """
    rows, counts = [], {"shortened": 0, "left out": 0}
    for conversation in conversations:
        tokens, mask = tokenizer.render(conversation)
        turns = len(conversation)
        while len(tokens) > longest and turns > 1:
            turns -= 1
            tokens, mask = tokenizer.render(conversation[:turns])
        if len(tokens) > longest or not any(mask):
            counts["left out"] += 1
            continue
        counts["shortened"] += turns < len(conversation)
        rows.append((np.array(tokens, np.int32), np.array(mask, bool)))
    return rows, counts


def weighted(rows):
    """Rows with the weights that make the sum of losses their mean: one over the number of targets."""
    targets = sum(int(mask[1:].sum()) for _, mask in rows)
    return [(tokens, mask / targets) for tokens, mask in rows]


def held_out_loss(model, rows, most):
    """The mean loss, in nats, of what the assistant must say."""
    read = []
    for tokens, targets, weights in batches.micro_batches(weighted(rows), most, model.config.n_positions):
        read.append((model.ops.read_later(model.losses(tokens, targets)), weights))
    return sum(float((losses() * weights).sum()) for losses, weights in read)


def show(tokenizer, conversations):
    """Conversations as one flat stream: bright (or between brackets) what the assistant must say."""
    before, after = ("\033[1;32m", "\033[0m") if common.colour() else ("[", "]")
    for conversation in conversations:
        tokens, mask = tokenizer.render(conversation)
        text, said = "", 0
        for token, wanted in zip(tokens, mask):
            text += before if wanted > said else after if wanted < said else ""
            text, said = text + tokenizer.decode([token]), wanted
        print(text + (after if said else "") + f"\n({len(tokens)} tokens, {sum(mask)} of them targets)\n")


# ------------------------------------------------------------------------------------------------------------
# The command line


def parser():
    flags = common.Parser(prog="sft.py", description=__doc__)
    whole, every = number(int, low=1), number(int, low=0)
    some, share = number(float, above=0), number(float, low=0)
    add = flags.add_argument_group("model and data").add_argument
    add("--init-from", default="runs/factbook", metavar="DIR", help="the model to begin with: of train.py")
    add("--out", default="runs/sft", metavar="RUN", help="the run's directory, a new one")
    words = "sources with their shares, as in factbook=3,tasks=2,jsonl:PATH=1; none: the default mixture"
    add("--data", metavar="SPEC", help=words)
    words = "what a probe wrote: teach it to say that it does not know the rest"
    add("--known", metavar="PATH", help=words)
    add("--skip-bad", action="store_true", help="leave out the bad lines of a jsonl:PATH, and count them")
    add("--resume", action="store_true", help="go on from RUN's newest checkpoint, with its flags")
    add = flags.add_argument_group("optimisation").add_argument
    add("--examples", type=whole, default=40000, metavar="N", help="conversations to draw")
    add("--epochs", type=whole, default=1, metavar="N", help="how often each is seen")
    add("--batch-size", type=whole, default=16, metavar="N", help="conversations in an update")
    words = "tokens of a micro-batch at most, padding included"
    add("--batch-tokens", type=whole, default=8192, metavar="N", help=words)
    add("--lr", type=some, default=3e-3, metavar="X", help="highest learning rate")
    add("--warmup-steps", type=every, default=50, metavar="N", help="steps up to it")
    add(
        "--final-lr",
        type=number(float, 0, 1),
        default=0.0,
        metavar="X",
        help="at the end, as a part of the highest",
    )
    add("--weight-decay", type=share, default=0.1, metavar="X", help="on matrices and embeddings")
    add("--grad-clip", type=some, default=1.0, metavar="X", help="largest norm of the gradient")
    add = flags.add_argument_group("evaluation and checkpoints (in steps; 0: never)").add_argument
    add("--eval-every", type=every, default=500, metavar="N", help="loss on held-out conversations")
    add("--exam-every", type=every, default=1000, metavar="N", help="a short exam")
    add("--save-every", type=every, default=500, metavar="N", help="write a checkpoint, and at the end")
    add("--keep", type=whole, default=2, metavar="N", help="checkpoints to keep, the newest")
    group = flags.add_argument_group("instead of training")
    add = group.add_mutually_exclusive_group().add_argument
    add("--show", type=whole, metavar="N", help="print N conversations as the model sees them")
    add("--probe", metavar="RUN", help="ask RUN every factual question, and write to a file what it knows")
    add("--eval", metavar="RUN", help="what RUN can do, as a table")
    group.add_argument("--to", default="known.jsonl", metavar="PATH", help="the file that a probe writes")
    group.add_argument("--k", type=whole, default=3, metavar="N", help="how often a probe asks")
    group.add_argument("--json", action="store_true", help="the table as one JSON object")
    add = flags.add_argument_group("machine").add_argument
    add("--seed", type=number(int, 0, 2**63), default=42, metavar="N", help="conversations and their order")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights; bfloat16: cuda only")
    return flags


def load(directory, flags):
    """Tokenizer and model of a run or checkpoint; a vocabulary without chat tokens gets them."""
    checkpoint = common.newest_checkpoint(directory)
    tokenizer = Tokenizer.load(checkpoint).with_chat_tokens()
    device, dtype = kernels.choose(flags.device, flags.dtype)
    return tokenizer, gpt2.GPT2.from_pretrained(checkpoint, device, dtype, vocab_size=tokenizer.vocab_size)


def parse(argv):
    """The flags; with --resume those of the run's newest checkpoint, unless given anew."""
    flags, checkpoint = parser().parse_args(argv), None
    if flags.resume:
        checkpoint, before = common.to_resume(flags.out)
        again = parser()
        again.set_defaults(**before)
        flags = again.parse_args(argv)
    elif not (flags.probe or flags.eval or flags.show):
        common.require_new(flags.out)
    return flags, checkpoint


def main(argv=None):
    flags, checkpoint = parse(argv)
    if flags.show:
        tokenizer = Tokenizer.load(common.newest_checkpoint(flags.init_from)).with_chat_tokens()
        return show(
            tokenizer,
            mixture.draw(flags.data or mixture.DEFAULT, flags.show, flags.seed, skip_bad=flags.skip_bad)[0],
        )
    if flags.probe or flags.eval:
        tokenizer, model = load(flags.probe or flags.eval, flags)
        known = evaluate.read_probe(flags.known) if flags.known and flags.eval else None
        known = known or evaluate.probe(model, tokenizer, flags.k, flags.seed, flags.probe and flags.to)
        return flags.eval and evaluate.table(evaluate.evaluate(model, tokenizer, known), flags.json)
    train(flags, checkpoint)


def train(flags, checkpoint):
    """The loop: as in train.py, on other data."""
    run, start, state = Path(flags.out), 0, {}
    tokenizer, model = load(checkpoint or flags.init_from, flags)
    team = distributed.Workers(model, {"accumulate": batches.share_of_rows})
    optimizer = gpt2.AdamW(model, weight_decay=flags.weight_decay)
    if checkpoint:
        state = common.read_state(checkpoint)
        start = state["step"]
        optimizer.load(checkpoint / "optimizer.safetensors")

    longest = model.config.n_positions + 1  # the last token is only a target
    spec = (flags.data or mixture.DEFAULT) + (f",unknown:{flags.known}={UNKNOWN}" if flags.known else "")
    drawn, dropped = mixture.draw(spec, flags.examples, flags.seed, skip_bad=flags.skip_bad)
    rows, shortened = prepare(tokenizer, drawn, longest)
    others = mixture.draw(spec, 300, flags.seed, split="test", skip_bad=flags.skip_bad)[0]
    held_out, _ = prepare(tokenizer, others, longest)
    if len(rows) < flags.batch_size:
        raise UserError(
            f"{len(rows)} conversations are fewer than --batch-size {flags.batch_size}; give more"
        )
    per_epoch = len(rows) // flags.batch_size
    steps = per_epoch * flags.epochs
    if start >= steps:
        raise UserError(
            f"{run} has all its {steps} steps; give more --epochs, or: python sample.py {run} --chat"
        )
    n_tokens, n_targets = sum(len(ids) for ids, _ in rows), sum(int(mask.sum()) for _, mask in rows)
    left_out = ", ".join(f"{n} {why}" for why, n in (dropped | shortened).items() if n)
    print(
        f"data      {len(rows)} conversations, {count(n_tokens)} tokens, {n_targets / n_tokens:.0%} targets"
    )
    print(f"          left out or shortened: {left_out or 'nothing'}")
    print(f"training  {steps} steps of {flags.batch_size} conversations, each seen {flags.epochs} times")

    run.mkdir(parents=True, exist_ok=True)
    log, line, interrupt = common.Log(run, start), common.Line(every=0), common.Interrupt()
    log.write("start", step=start, flags=vars(flags), conversations=len(rows), dropped=dropped | shortened)
    skipped, spent = state.get("skipped", 0), 0.0
    for step in range(start, steps):
        began = time.perf_counter()
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([flags.seed, epoch]).permutation(len(rows))
        chosen = order[place * flags.batch_size : (place + 1) * flags.batch_size]
        batch = weighted([rows[i] for i in chosen])
        loss = batches.gradient(team, batch, flags.batch_tokens)
        lr = learning_rate(step, steps, flags.lr, flags.warmup_steps, flags.final_lr)
        norm = optimizer.step(lr, flags.grad_clip, np.inf if np.isfinite(loss) else -1)  # -1: no update
        skipped = 0 if np.isfinite(loss + norm) else skipped + 1
        if skipped == 10:
            raise UserError(
                f"10 steps in a row had a loss or gradient that is no number; nothing was updated with them. "
                f"Lower --lr {flags.lr} and --resume, or start anew"
            )
        seconds, done = time.perf_counter() - began, step + 1
        spent += seconds
        speed, left = sum(len(ids) for ids, _ in batch) / seconds, spent / (done - start) * (steps - done)
        line.show(
            f"step {done}/{steps} | loss {loss:.4f} | norm {norm:.3f} | lr {lr:.2e} | "
            f"{seconds * 1e3:.0f} ms | {count(speed)} tok/s | {duration(left)} left"
            + (" | SKIPPED" if skipped else "")
        )
        log.write(
            "step", step=done, loss=loss, norm=norm, lr=lr, seconds=seconds, speed=speed, skipped=skipped > 0
        )
        last = done == steps
        stopping = interrupt.asked and not last
        if last or stopping or (flags.save_every and done % flags.save_every == 0):
            state = dict(stage="sft", skipped=skipped, flags=vars(flags))
            place = common.save_checkpoint(run, done, model, tokenizer, optimizer, flags.keep, **state)
            log.write("checkpoint", step=done, path=place.name)
        if stopping:
            line.clear()
            common.say(
                f"stopped after step {done}; go on with: python sft.py --out {shlex.quote(str(run))} --resume"
            )
            raise SystemExit(130)
        if last or (flags.eval_every and done % flags.eval_every == 0):
            held = held_out_loss(model, held_out, flags.batch_tokens)
            line.clear(f"step {done}: loss on held-out conversations {held:.4f}")
            log.write("eval", step=done, loss=held)
        if flags.exam_every and done % flags.exam_every == 0 and not last:
            results = evaluate.evaluate(model, tokenizer, n=20)
            line.clear(evaluate.line(results))
            log.write("exam", step=done, results=results)
    line.clear(f"done: {place}; talk to it: python sample.py {run} --chat")


if __name__ == "__main__":
    common.run(main)
