"""Continued texts: what `generate` says to each alone, up to where a task ends it."""

import functools

import harness_runs
import numpy as np
import pytest
from harness_runs import CHARS, LINE, WORDS, Request, requests

from xlformer import sharding
from xlformer.errors import UserError
from xlformer.generation import continuation
from xlformer.generation.sampling import Sampling
from xlformer.harness import Answerer, continuations
from xlformer.harness.continuations import GREEDY, Wanted
from xlformer.scoring import EvalSettings

ONE = sharding.make_mesh({"data": 1})
CONTEXTS = ["", "the cat", LINE, "o", LINE * 2 + "the"]
TOKENS = 21


@functools.cache
def answerer(rows=2, vocabulary=CHARS):
    run = harness_runs.run(vocabulary)
    return Answerer(run, EvalSettings(batch_size=rows), mesh=ONE, max_gen_toks=TOKENS)


@functools.cache
def plain(vocabulary=CHARS):
    """What generate says to each context behind a line end."""
    run = harness_runs.run(vocabulary)
    prompts = [vocabulary.encode("\n" + text, close_line=False) for text in CONTEXTS]
    tokens_RN, _ = continuation.generate(
        run.model, run.params, prompts, num_tokens=TOKENS, sampling=GREEDY, step=7
    )
    return [vocabulary.decode(ids) for ids in tokens_RN]


def ask(one, how, contexts=CONTEXTS):
    return one.generate_until(requests(*((text, how) for text in contexts)))


def test_a_context_is_continued_as_generate_does():
    assert ask(answerer(), {}) == plain()
    assert ask(answerer(), {"do_sample": False, "temperature": 0.7}) == plain()
    found = ask(answerer(), {"max_gen_toks": 3, "temperature": 0.0})
    assert found == [text[:3] for text in plain()]
    # Whatever comes side by side: each its own length, its own end.
    hows = [{"max_gen_toks": n} for n in (5, 21, 1, 2, 17)]
    hows[1]["until"] = [plain()[1][4:6], "never"]
    pairs = zip(CONTEXTS, hows, strict=True)
    found = answerer().generate_until(requests(*pairs))
    expected = [
        text[: how["max_gen_toks"]] for text, how in zip(plain(), hows, strict=True)
    ]
    expected[1] = expected[1][: expected[1].index(plain()[1][4:6])]
    assert found == expected


def test_words_and_ends_of_lines():
    (text, *_) = ask(answerer(vocabulary=WORDS), {"until": "\n"}, ["the cat"])
    first, *_ = plain(WORDS)[1].split("\n")
    assert text == (f" {first}" if first else "")


def test_samples_depend_on_the_seed_and_the_place_alone():
    how = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 8}
    found = ask(answerer(), how, ["the"] * 3)
    assert len(set(found)) == 3
    assert ask(answerer(), how, ["the"] * 3) == found
    assert ask(answerer(3), how, ["the"] * 3) == found
    other = Answerer(harness_runs.run(), mesh=ONE, seed=1)
    assert ask(other, how, ["the"] * 3) != found
    # A greedy one among them is as it is alone.
    mixed = requests(("the cat", {}), ("the", how))
    assert answerer().generate_until(mixed)[0] == plain()[1]


def test_how_a_task_says_it():
    def of(**given):
        return Wanted.of(given, 256, "here")

    assert of() == ((), 256, GREEDY)
    assert of(until="\n", max_new_tokens=7) == (("\n",), 7, GREEDY)
    assert of(until=["a", ""], max_tokens=7, max_gen_toks=8) == (("a",), 8, GREEDY)
    assert of(until=None, num_beams=1).stops == ()
    assert of(temperature=0.5).sampling == Sampling(temperature=0.5)
    assert of(do_sample=True).sampling == Sampling()
    assert of(do_sample=True, temperature=0).sampling == GREEDY
    assert of(do_sample=False, temperature=0.5, top_k=3).sampling == GREEDY
    assert of(do_sample=True, top_k=3.0, top_p=0.9).sampling == Sampling(1.0, 3, 0.9)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"untill": "\n"}, "generation has no untill='\\n', did you mean 'until'?"),
        ({"num_beams": 4}, "num_beams=4 is not possible here, only 1"),
        ({"until": [3]}, "until=[3] is not texts"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 must be a number from 1 to 2147483632"),
        ({"max_gen_toks": "9"}, "max_gen_toks='9' must be a number from 1 to"),
        ({"temperature": "hot"}, "temperature='hot' is not a number"),
        ({"temperature": -1, "do_sample": True}, "temperature=-1.0 must be finite"),
        ({"top_p": 2, "do_sample": True}, "top_p=2.0 must be in (0, 1]"),
    ],
)
def test_what_a_task_may_not_say(given, line):
    with pytest.raises(UserError) as error:
        answerer().generate_until([Request(("the", given), "mine", 3)])
    assert str(error.value).startswith(f"task mine, document 3: {line}")


def test_progress_is_said():
    said = []

    class Text:
        def read(self, prompts):
            self.rows = len(prompts)

        def draw(self, tokens, on_tokens):
            on_tokens(np.zeros((self.rows, 4), int))

    continuations.continued(
        lambda rows, **_: Text(),
        CHARS,
        [[1]] * 5,
        [Wanted((), 4, GREEDY)] * 5,
        rows=2,
        progress=said.append,
    )
    assert said == [0.4, 0.8, 1.0]
