"""What a training run takes on GPUs, predicted where there is none: memory, seconds, hours and dollars.

    python train.py --model d12 --plan --gpus 8xH100
    python train.py --choose                          the --model that this machine can train in a day

The prediction adds up a step from rates that were measured for single kernels, on an H200 (RESULTS.md in
kernels/): FLOP of matrix products and of attention over what those reach, bytes over what the others move.
Other cards are scaled by the ratio of their datasheets: they have not been measured, and other kernels run
where the card is not sm_90. Sums over GPUs have not been measured at all. A small model takes longer than
this, because it waits for Python's launches: there is no plan for it.

Read train.py first, whose measure_steps() and print_plan() do the same on a machine that is there.
"""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import distributed
import gpt2
import kernels
import train
from common import UserError, duration, say, size

# From the datasheets: bandwidth of the memory in bytes/s, its bytes, and bytes/s to another card (NVLink, or
# PCIe, one direction). train.DATASHEETS has the FLOP/s.
CARDS = {
    "H200": (4.8e12, 141e9, 450e9),
    "H100 PCIe": (2.0e12, 80e9, 64e9),
    "H100 NVL": (3.9e12, 94e9, 300e9),
    "H100": (3.35e12, 80e9, 450e9),
    "A100": (2.039e12, 80e9, 300e9),
    "L40S": (864e9, 48e9, 32e9),
    "L4": (300e9, 24e9, 32e9),
    "A10": (600e9, 24e9, 32e9),
    "RTX 4090": (1008e9, 24e9, 32e9),
    "T4": (320e9, 16e9, 16e9),
}
DOLLARS = {"H100": 3.5, "A100": 1.7}  # a GPU and hour: what llm.c's published runs cost
# Measured on the H200: a layer's products with what is fused into them, for 768 and 1,600 channels; the
# classifier's; attention forward and backward, as it is between a step's products; bytes that kernels move.
LAYER_FLOPS, HEAD_FLOPS, ATTENTION_FLOPS, BANDWIDTH = (620e12, 648e12), 680e12, (282e12, 239e12), 4.0e12
LINK_SHARE = 0.8  # of NVLink's rate that NCCL's sums reach: assumed
# What kernels/cuda.py has under these names: it cannot be imported without a GPU.
ON_GPU = SimpleNamespace(LOGITS=8192 * 50304, BATCH_TOKENS=1 << 17, SHARE=0.9)
LLM_C = {  # milliseconds of a step that llm.c published, on eight cards
    ("d12", "A100"): 300,
    ("d12", "H100"): 140,
    ("d24", "A100"): 820,
    ("d24", "H100"): 348,
    ("d36", "A100"): 1700,
    ("d48", "H100"): 2800,
}
SHARDS = 20.7e9  # bytes of FineWeb's 103 shards


def parse_gpus(text):
    """ "8xH100" -> (8, "H100"); a name may have more words around it, as the driver's has."""
    number, name = re.fullmatch(r"(?:(\d+)x)?(.*)", text).groups("1")
    cards = [card for card in CARDS if card in name and name[0].isalpha()]
    if not cards or int(number) < 1:
        raise UserError(f"--gpus {text}: write a number and a card, as 8xH100; known are {', '.join(CARDS)}")
    return int(number), cards[0]


def gpus_here():
    """This machine's GPUs in the words of --gpus; ImportError if there is none."""
    return f"{distributed.gpu_count()}x{kernels.load('cuda').card_name()}"


def micro_batch_seconds(config, B, T, card, dtype="bfloat16", recompute=False):
    """Seconds of a forward and a backward pass over B rows of T tokens on a card."""
    N, C, L, Vp = B * T, config.n_embd, config.n_layer, config.padded_vocab_size
    compute = train.DATASHEETS[card][dtype] / train.DATASHEETS["H200"]["bfloat16"]
    move = CARDS[card][0] / CARDS["H200"][0] * BANDWIDTH
    itemsize = 2 if dtype == "bfloat16" else 4
    # Products: 12 C^2 weights a layer, two FLOP each, forward, for the input's gradient, for the weight's.
    products = L * 72 * N * C * C / np.interp(C, (768, 1600), LAYER_FLOPS) + 6 * N * C * Vp / HEAD_FLOPS
    # Attention: two products forward and five backward, of the half that causality leaves.
    attention = L * N * T * C * (2 / ATTENTION_FLOPS[0] + 5 / ATTENTION_FLOPS[1])
    # Elements that are read or written: by layernorms forward and backward (2 + 4 of each, two a layer), for
    # gradients of biases (8 C a layer), by embeddings and the last layernorm, and logits by the classifier.
    elements = N * C * (L * (2 * 6 + 8 + (12 if recompute else 0)) + 12) + 2 * N * Vp
    return (products + attention) / compute + elements * itemsize / move


def update(config, card, ranks, zero, dtype="bfloat16"):
    """(seconds of an update, bytes that each rank sends for the sums before it and the parameters after)."""
    n, bandwidth = config.n_params(), CARDS[card][0] / CARDS["H200"][0] * BANDWIDTH
    # The norm reads the gradient; then gradient, weights and moments are read and written, in float32.
    moved = n * (4 + 32 / (ranks if zero else 1))
    # A ring: every rank sends (ranks - 1) / ranks of the gradients twice, or with zero once, and parameters.
    parameters = 2 if dtype == "bfloat16" else 4
    sent = n * (4 + parameters if zero else 8) * (ranks - 1) / ranks
    return moved / bandwidth, sent


def predict(flags, ranks, card):
    """What a run with these flags takes on so many cards: .memory in bytes, .step in seconds, and parts."""
    sizes = {**gpt2.PRESETS[flags.model], "n_positions": max(1024, flags.seq_len)}
    config = gpt2.GPT2Config(**sizes, vocab_size=50257)
    dtype = "bfloat16" if "bfloat16" in train.DATASHEETS[card] else "float32"
    rows = flags.total_batch_tokens // flags.seq_len
    if rows % ranks:
        raise UserError(
            f"{ranks} GPUs do not divide the {rows} rows of an update; change --total-batch-tokens"
        )
    wanted = SimpleNamespace(**vars(flags) | dict(ranks=ranks, dtype=dtype, resume=False))
    ops = SimpleNamespace(**vars(ON_GPU), free_memory=lambda: CARDS[card][1])
    memory = train.choose_batch_size(wanted, config, ops, distributed.World(0, 1), one_memory=False)
    B, T = wanted.batch_size, flags.seq_len
    plan = SimpleNamespace(config=config, memory=memory, batch_size=B, dtype=dtype)
    plan.passes = rows // ranks / B * micro_batch_seconds(config, B, T, card, dtype, flags.recompute)
    plan.update, plan.sent = update(config, card, ranks, flags.zero, dtype)
    plan.sums = plan.sent / (CARDS[card][2] * LINK_SHARE)
    plan.step = plan.passes + plan.update + plan.sums
    return plan


def show(flags):
    """Print the plan of a run on --gpus, or on those of this machine."""
    if flags.model == "tiny":
        raise UserError(
            "a small model's time on a GPU is that of Python's launches; plan --model d12 or larger"
        )
    try:
        ranks, card = parse_gpus(flags.gpus or gpus_here())
    except ImportError as error:
        raise UserError(f"{error}; or name GPUs that are elsewhere: --gpus 8xH100") from None
    plan = predict(flags, ranks, card)
    step_times = {flags.short_len: plan.step, flags.seq_len: plan.step}
    if flags.hours:
        flags.steps = train.steps_in(flags.hours, flags, step_times)
    seconds = train.run_seconds(flags.steps, flags, step_times)
    price = flags.dollars_per_hour or DOLLARS.get(card, 0) * ranks
    dollars = f", ${seconds / 3600 * price:,.0f} at ${price:g} an hour" if price else ""
    split = ", ".join(f"{what} {size(int(n_bytes))}" for what, n_bytes in plan.memory.items())
    tokens, name = flags.total_batch_tokens, Path(flags.data).name
    published = LLM_C.get((flags.model, card)) if ranks == 8 else None
    total, card_memory = int(sum(plan.memory.values())), int(CARDS[card][1])
    print(f"plan      {flags.model} on {ranks} x {card}, {plan.dtype}, micro-batches of ", end="")
    print(f"{plan.batch_size} x {flags.seq_len}: {flags.steps:,} steps of {tokens:,} tokens")
    print(f"memory    {size(total)} a GPU, which has {size(card_memory)}:")
    print(f"          {split}")
    print(f"step      {plan.step * 1e3:.0f} ms, {tokens / plan.step:,.0f} tokens/s:")
    print(f"          forward and backward {plan.passes * 1e3:.0f} ms, update {plan.update * 1e3:.1f} ms,")
    print(f"          sums over GPUs {plan.sums * 1e3:.1f} ms for {size(int(plan.sent))} that each sends")
    print(f"run       {duration(seconds)}{dollars}")
    print(f"published {train.published(flags, 'fineweb' if name == 'factbook' else name)}")
    if published:
        print(f"          llm.c published {published} ms a step on 8 x {card}")
    if card != "H200":
        print(f"note      the rates are an H200's, scaled to the {card}'s datasheet; none was measured on it")
    if ranks > 1:
        print("note      nothing was measured on several GPUs: the rate between them is the datasheet's")


def choose(flags):
    """Print the preset that this machine can train in a day, and on standard error why."""
    model, remedy = "tiny", "; make train MODEL=d12 trains GPT-2's 124M parameters all the same"
    d12 = train.parse(["--model", "d12", "--zero", str(flags.zero)])[0]
    try:
        ranks, card = parse_gpus(gpus_here())
        plan = predict(d12, ranks, card)
    except ImportError as error:
        reason, remedy = str(error), ""
    except UserError as error:
        reason = str(error)
    else:
        hours = plan.step * d12.steps / 3600
        needed = int(SHARDS + (d12.keep + 1) * 12 * plan.config.n_params())
        fetched = sum(path.stat().st_size for path in Path("shards/fineweb").glob("*.bin"))
        room = shutil.disk_usage(".").free + fetched
        reason = f"d12 takes {hours:.1f} hours on {ranks} x {card}"
        if room < needed:
            reason, remedy = f"d12 needs {size(needed)} of disk, {size(room)} are free", "; free some space"
        elif hours <= 24:
            model, remedy = "d12", "; make train MODEL=tiny trains a small model in minutes"
    print(model)
    say(f"training {model}: {reason}{remedy}")
