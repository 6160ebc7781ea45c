"""experiments/: comparisons of answers as a file, and what a reward model learns of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from test_rlhf import BYTES, CONFIG, rollout

import common
import gpt2
import rl
from common import UserError
from experiments import comparisons, preferences
from experiments.updates import fit_reward
from extras import rlhf
from tasks.conversations import turns
from tasks.problems import problems
from tokenizer import text_of

LINES = [json.dumps(dict(prompt=f"{i}?", winner="a", loser="b")) for i in range(16)]


@pytest.mark.parametrize(
    "line, words",
    [
        (b"a?\ta\tb", "line 17: no JSON object with prompt, winner and loser"),
        (b'["a?", "a", "b"]', "line 17: no JSON object"),
        (b'{"prompt": "a?", "winner": "a"}', "line 17: no JSON object"),
        (b"", "line 17: no JSON object"),
        (b'{"prompt": "a?", "winner": 1, "loser": "b"}', "line 17: .* must be texts"),
        (b'{"prompt": "a?", "winner": " ", "loser": "b"}', "line 17: .* not empty"),
        (b'{"prompt": "a?", "winner": "a", "loser": "a"}', "line 17: winner and loser are the same"),
        (b"\xff", "line 17: no JSON object"),
    ],
)
def test_the_line_that_is_no_comparison_is_named(tmp_path, line, words):
    path = tmp_path / "people.jsonl"
    path.write_bytes(b"\n".join([*(one.encode() for one in LINES), line, LINES[0].encode()]))
    with pytest.raises(UserError, match=f"people.jsonl.*{words}"):
        comparisons.read(path)


def test_a_file_of_comparisons_is_there_and_has_enough(tmp_path):
    with pytest.raises(UserError, match="nowhere cannot be read"):
        comparisons.read(tmp_path / "nowhere")
    (tmp_path / "few").write_text("\n".join([*LINES[1:], LINES[1]]))
    with pytest.raises(UserError, match="15 prompts"):
        comparisons.read(tmp_path / "few")
    separator = '{"prompt": "two\u2028lines", "winner": "a", "loser": "b"}'  # JSON allows it in a string
    (tmp_path / "enough").write_text("\ufeff" + "\n".join([separator, *LINES]) + "\n", encoding="utf-8")
    read = comparisons.read(tmp_path / "enough")
    assert read == [("two\u2028lines", "a", "b"), *((f"{i}?", "a", "b") for i in range(16))]
    longest = max(len(BYTES.render(turns(prompt, "a"))[0]) for prompt, *_ in read)
    assert comparisons.read(tmp_path / "enough", BYTES, longest) == read
    with pytest.raises(UserError, match=f"enough, line 1: {longest} tokens where {longest - 1} have"):
        comparisons.read(tmp_path / "enough", BYTES, longest - 1)


def test_the_winner_of_an_example_is_truly_better(tmp_path):
    stream = problems("decimals", level=2)
    some = {problem.prompt: problem for problem in (next(stream) for _ in range(80))}
    comparisons.write_example(tmp_path / "example", some.values())
    n_wrong = 0
    for prompt, *texts in comparisons.read(tmp_path / "example"):
        parts = [[{"type": "text", "text": text}] for text in texts]
        winner, loser = (rlhf.true_score(some[prompt], each, finished=True) for each in parts)
        assert winner > loser
        n_wrong += loser == 0
    assert 0.2 < n_wrong / len(some) < 0.8


def test_what_is_held_out_is_not_asked_in_training_in_other_words():
    compared = [(f"{i // 3} in wording {i % 3}", "a", "b") for i in range(96)]
    keys = {prompt: prompt.split()[0] for prompt, *_ in compared}
    training, held_out = comparisons.split(compared, keys, seed=0)
    assert sorted(training + held_out) == sorted(compared) and len(held_out) == 12
    assert not {keys[one[0]] for one in training} & {keys[one[0]] for one in held_out}
    assert len(comparisons.split(compared, {}, seed=0)[1]) == 12  # each prompt is its own key


def test_rollouts_are_compared_within_their_group():
    right, wrong = rollout("a"), rollout("b")
    other = rollout("c", answer="c")
    assert comparisons.of_groups([[right, wrong, wrong], [other], [wrong]]) == [
        (right, wrong),
        (right, wrong),
    ]


def test_an_exploit_is_wrong_and_pleases_more_than_the_winner():
    group = [rollout(said) for said in ("a", "b", "c", "d")]  # "a" is right
    for one, reward in zip(group, (9.0, 3.0, 5.0, 1.0)):
        one.reward = reward
    prompt = group[0].problem.prompt
    for limit, said in ((2.0, ["c"]), (4.0, ["c"]), (6.0, [])):
        judge = SimpleNamespace(values=lambda rollouts, limit=limit: np.array([limit] * len(rollouts)))
        found = comparisons.exploits(judge, BYTES, [group], {prompt: "a"})
        assert [text_of(one.parts) for one in found] == said


def test_a_reward_model_learns_what_people_prefer():
    """Short answers win here. New ones are in order, too."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdef"), 4)) for _ in range(96)]
    compared = [("Say it.", word, f"{word} and {word}") for word in words]
    judge = rlhf.RewardModel(gpt2.GPT2(CONFIG, seed=1), BYTES, test_groups=[])
    pairs = comparisons.pairs(BYTES, compared)
    fit_reward(judge, pairs[:64], steps=12, seed=0, per_step=16)
    assert comparisons.pairwise_accuracy(judge, pairs[64:]) > 0.9
    assert comparisons.pairwise_accuracy(judge, [pair[::-1] for pair in pairs[64:]]) < 0.1


@pytest.fixture
def assistant(tmp_path, monkeypatch):
    """A model that has learned nothing, and a search that finds nothing: the Factbook takes long to read."""
    run = tmp_path / "assistant"
    run.mkdir()
    monkeypatch.setitem(rl.TOOLS, "search", "nothing about {}".format)
    config = gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=256, vocab_size=BYTES.vocab_size)
    model = gpt2.GPT2(config, seed=3)
    common.save_checkpoint(run, 1, model, BYTES, gpt2.AdamW(model), 1, stage="sft")
    return run


def test_people_s_own_comparisons(assistant, tmp_path, capsys):
    path = tmp_path / "people.jsonl"
    lines = [dict(prompt=f"Say {i}.", winner=f"It is {i}.", loser="No.") for i in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--quick", "--seeds", "1", "--init-from", str(assistant), "--out", str(tmp_path)]
    preferences.main([*flags, "--comparisons", str(path)])
    assert "round 2, an exploit" in capsys.readouterr().err
    path.write_text("[]\n")
    with pytest.raises(UserError, match="line 1: no JSON"):
        preferences.main([*flags, "--comparisons", str(path)])
