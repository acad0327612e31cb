"""The example that people with an agent start from: its task and its segments."""

import functools
import pathlib
import re

import jax
import memory_task as task
import numpy as np

from xlformer.layers import memory

SETTINGS = task.Settings(environments=8, updates=2)
AGENT = task.Agent(SETTINGS)


@functools.cache
def collected():
    """Parameters, four segments, and what would come next."""
    params, carry = AGENT.init(jax.random.key(0)), AGENT.start(jax.random.key(1))
    segments = []
    for _ in range(4):
        segment, carry = AGENT.collect(params, carry)
        segments.append(jax.device_get(segment))
    return params, segments, carry


def test_the_page_about_it_runs():
    page = pathlib.Path(__file__).parents[2] / "docs" / "reinforcement_learning.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    found = {}
    exec(compile(code, page.name, "exec"), found)
    assert found["y_BTD"].shape == (8, 16, 32)
    # A reset at step 5 of 16 leaves 11 of them to be remembered.
    assert found["state"].length_B.tolist() == [16] * 3 + [11] + [16] * 4


def joined(field):
    return np.concatenate([getattr(s, field) for s in collected()[1]], axis=1)


def test_an_episode_shows_a_cue_and_asks_for_it_after_a_segment():
    seen, ended = joined("observations_BTO"), joined("ended_BT")
    cues, questions = seen[..., -2].astype(bool), seen[..., -1].astype(bool)
    assert (questions == ended).all() and ended.any(axis=1).all()
    assert (cues[:, 1:] == ended[:, :-1]).all() and cues[:, 0].all()
    assert (cues == joined("resets_BT")).all()
    assert (seen[..., : task.CUES].sum(-1) == 1).all()
    rewards, actions = joined("rewards_BT"), joined("actions_BT")
    for b, t in zip(*np.nonzero(ended), strict=True):
        first = np.nonzero(cues[b, : t + 1])[0][-1]
        assert task.SHORTEST <= t - first - 1 <= task.LONGEST
        assert SETTINGS.segment_length < t - first <= SETTINGS.memory_length
        cue = seen[b, first, : task.CUES].argmax()
        assert rewards[b, t] == (actions[b, t] == cue)
    assert not rewards[~ended].any() and 0 < rewards.sum() < ended.sum()


def test_replayed_segments_give_the_states_of_the_rollout_bit_by_bit():
    params, segments, carry = collected()
    assert np.stack([s.resets_BT[:, 1:] for s in segments]).any()  # within segments
    state = segments[0].state
    for before, after in zip(segments, [*segments[1:], carry], strict=True):
        log_p_BTA, _, state = AGENT.replay(params, before, state)
        jax.tree.map(np.testing.assert_array_equal, state, after.state)
        found = np.take_along_axis(log_p_BTA, before.actions_BT[..., None], 2)[..., 0]
        np.testing.assert_allclose(found, before.log_p_BT, atol=1e-5)


def test_without_its_resets_a_segment_gives_another_state():
    params, segments, carry = collected()
    wrong = segments[-1]._replace(resets_BT=np.zeros_like(segments[-1].resets_BT))
    _, _, state = AGENT.replay(params, wrong, wrong.state)
    assert not np.array_equal(state.length_B, carry.state.length_B)
    assert isinstance(state, memory.Memory)


def test_it_runs_and_says_what_it_measured(capsys):
    assert task.main(["--seeds=3", "--environments=8", "--updates=2"]) == 0
    first, line = capsys.readouterr().out.splitlines()
    assert first.endswith("a guess gets 0.25")
    assert line.startswith("memory 32, gate gru, seed 3: 0.") and "steps/s" in line
