"""Choosing between many samples of one prompt: by a vote, by probability, or by a verifier.

    python -m extras.choose RUN --prompt "What is 23 * 47?" --vote
    python -m extras.choose RUN --prompt "What is 23 * 47?" --num-samples 64 --best
    python -m extras.choose RUN --prompt "What is 23 * 47?" --verify arithmetic --answer 1081

A model that is right in some of its samples is right more often if something chooses a good one of them.
--vote takes the answer that most samples give ("self-consistency", Wang et al. 2022); it needs samples that
mark their answer with "Answer:", as the worked solutions do. --best takes the sample of the highest mean
log-probability. --verify is told the correct answer, and takes the most probable of the samples that give it.
The share of prompts for which there is such a sample is pass@N, and no choice can do better. Read sample.py
before this file.
"""

import json

import sample
from common import Parser, UserError, printable, run
from tasks.problems import TASKS, Problem, marked, votes
from tokenizer import text_of


def main(argv=None):
    flags = parser().parse_args(argv)
    if bool(flags.verify) != bool(flags.answer):
        raise UserError("--verify and --answer belong together; give both")
    prompt = sample.read_prompt(flags)
    model, tokenizer, checkpoint = sample.load(flags.directory, flags)
    assistant = sample.is_assistant(checkpoint) and not flags.raw
    settings = sample.settings_of(flags, assistant)

    prompts = [prompt] * flags.num_samples
    completions = sample.complete(model, tokenizer, prompts, assistant, stop_texts=flags.stop, **settings)
    texts = [text_of(tokenizer.parts(completion.ids)) for completion in completions]  # without tool calls

    by_answer = votes(texts, prompt)  # for every answer the indices of its texts, the most frequent first
    correct = []  # indices of the texts whose answer is right
    if flags.verify:
        problem = Problem(flags.verify, prompt, solution="", answer=flags.answer)
        correct = [i for i, text in enumerate(texts) if problem.verify(text)]
    if flags.vote:
        chosen = by_answer[0][0] if by_answer else None
    else:
        chosen = most_probable(completions, correct or range(len(texts)))

    answers = [(marked(texts[indices[0]]), len(indices)) for indices in by_answer]
    if flags.json:
        report = sample.json_report(flags, settings, checkpoint, prompt, completions)
        report.update(chosen=chosen, votes=answers, correct=correct)
        print(json.dumps(report, ensure_ascii=False))
    elif flags.vote:
        counts = [f"{answer}: {count}" for answer, count in answers]
        n_without = len(texts) - sum(count for _, count in answers)
        if n_without:
            counts.append(f"without an answer: {n_without}")
        print(answers[0][0] if answers else "")
        print(f"[of {len(texts)} texts, {', '.join(counts)}]")
    else:
        text = completions[chosen].text
        print(printable(text if assistant else prompt + text))
        mean = f"mean log-probability {completions[chosen].mean_logprob:.3f}"
        verdict = f"; {len(correct)} of them right" if flags.verify else ""
        print(f"[{mean}, the best of {len(texts)}{verdict}]")
    sample.say_speed(flags, completions)


def most_probable(completions, indices):
    """The index, of these, of the completion of the highest mean log-probability."""
    return max(indices, key=lambda i: completions[i].mean_logprob)


def parser():
    flags = Parser(prog="python -m extras.choose", description="Write many texts, and choose one of them.")
    group = flags.add_argument_group("choice")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--vote", action="store_true", help="the answer that most texts give")
    add("--best", action="store_true", help="the most probable text")
    tasks = [name for name in (*TASKS, "gsm8k") if name != "countdown"]  # its answer lists the numbers to use
    words = "the most probable correct text, as the verifier of this task finds it"
    add("--verify", metavar="TASK", choices=tasks, help=words)
    group.add_argument("--answer", metavar="TEXT", help="the correct answer, for --verify")
    sample.add_flags(flags, num_samples=16)
    return flags


if __name__ == "__main__":
    run(main)
