"""Recall after a delay: PPO with Transformer-XL's memory as the agent's.

    python examples/memory_task.py [--seeds=0,1,2] [--memory_length=0] [--gate=none]

An episode shows a cue, then distractors for longer than a segment, then asks for the
cue; what else the agent does counts for nothing. Without memory an answer is a guess.

The agent acts step by step, and learns from whole segments with the state that was
before them. That state is carried from segment to segment by the learner's own call, so
replaying stored segments gives the states of the rollout bit by bit (step by step, sums
in another order would differ in their last bits).

Letters of axes: B environments, T steps, O observation, D width, A actions.
"""

import argparse
import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xlformer import models
from xlformer.models import TransformerXLConfig

CUES, SHORTEST, LONGEST = 4, 18, 30  # distractors between cue and question
EACH = 25  # updates in a number of the printed curve


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a run. The cue lies at most memory_length steps before the question."""

    memory_length: int = 32
    gate: str = "gru"
    environments: int = 64
    segment_length: int = 16
    updates: int = 150
    epochs: int = 3
    minibatches: int = 4
    learning_rate: float = 1e-3
    discount: float = 0.95
    trace: float = 0.9  # lambda of generalised advantages
    clip: float = 0.2
    entropy: float = 0.01


# The task, for one environment --------------------------------------------------------


class World(NamedTuple):
    """An environment: its cue, what it shows, when it asks, the time, its key."""

    cue: Any
    symbol: Any
    asks_at: Any
    time: Any
    key: Any


def new_episode(key) -> World:
    key, cue_key, delay_key = jax.random.split(key, 3)
    cue = jax.random.randint(cue_key, (), 0, CUES)
    delay = jax.random.randint(delay_key, (), SHORTEST, LONGEST + 1)
    return World(cue, cue, delay + 1, jnp.int32(0), key)


def observe(world: World):
    """The symbol, and whether it is the cue or the question is asked, [O]."""
    flags = jnp.array([world.time == 0, world.time == world.asks_at])
    return jnp.concatenate([jax.nn.one_hot(world.symbol, CUES), flags])


def step(world: World, action):
    """(world, reward, whether the episode ended; then `world` is a new one)."""
    ended = world.time == world.asks_at
    reward = jnp.where(ended & (action == world.cue), 1.0, 0.0)
    key, symbol_key = jax.random.split(world.key)
    symbol = jax.random.randint(symbol_key, (), 0, CUES)
    later = World(world.cue, symbol, world.asks_at, world.time + 1, key)
    return _choose(ended, new_episode(key), later), reward, ended


def _choose(which, a, b):
    return jax.tree.map(functools.partial(jnp.where, which), a, b)


# The agent ----------------------------------------------------------------------------


class Segment(NamedTuple):
    """What is stored of T steps of all environments.

    Attributes:
      state: of the model before the first step.
      resets_BT: true where an episode begins.
      log_p_BT: of the actions, when they were taken.
      next_BO, next_reset_B: what comes after the segment.
    """

    state: Any
    observations_BTO: Any
    resets_BT: Any
    actions_BT: Any
    log_p_BT: Any
    rewards_BT: Any
    ended_BT: Any
    next_BO: Any
    next_reset_B: Any


class Carry(NamedTuple):
    """What goes from segment to segment: a plain tree of arrays."""

    worlds: World
    resets_B: Any  # of the steps to come
    state: Any
    key: Any


@dataclasses.dataclass(frozen=True)
class Agent:
    """Observations in, a policy and a value out; its memory is the model's state."""

    settings: Settings

    @functools.cached_property
    def model(self):
        M = self.settings.memory_length
        return models.build(
            TransformerXLConfig(
                vocab_size=1,  # no tokens: vectors go into the trunk
                n_layer=2,
                d_model=32,
                n_head=2,
                d_inner=64,
                gate=self.settings.gate,
                pre_norm=True,
                final_norm=True,
                memory_length=M,
                # A step alone sees M steps back. So does each step of a segment then.
                window=M,
                dropout=0.0,
                init_std=0.15,
                dtype="float32",
            )
        )

    @functools.partial(jax.jit, static_argnums=0)
    def init(self, key):
        trunk_key, in_key, out_key = jax.random.split(key, 3)
        D = self.model.width
        return {
            "trunk": self.model.trunk.init(trunk_key),
            "in_OD": jax.random.normal(in_key, (CUES + 2, D)),
            # Small: the first policy is nearly uniform. The last column is the value.
            "out_DA": 0.01 * jax.random.normal(out_key, (D, CUES + 1)),
        }

    @functools.partial(jax.jit, static_argnums=0)
    def start(self, key) -> Carry:
        B = self.settings.environments
        key, world_key = jax.random.split(key)
        worlds = jax.vmap(new_episode)(jax.random.split(world_key, B))
        return Carry(worlds, jnp.ones(B, bool), self.model.init_state(B), key)

    def __call__(self, params, observations_BTO, resets_BT, state):
        """log p of each action, [B, T, A], values, [B, T], and the state after."""
        x_BTD = jnp.einsum("BTO,OD->BTD", observations_BTO, params["in_OD"])
        y_BTD, state, _ = self.model.trunk.apply(
            params["trunk"], x_BTD, state, resets_BT=resets_BT
        )
        out_BTA = jnp.einsum("BTD,DA->BTA", y_BTD, params["out_DA"])
        return jax.nn.log_softmax(out_BTA[..., :-1]), out_BTA[..., -1], state

    @functools.partial(jax.jit, static_argnums=0)
    def replay(self, params, segment: Segment, state):
        """The call over a whole segment."""
        return self(params, segment.observations_BTO, segment.resets_BT, state)

    @functools.partial(jax.jit, static_argnums=0)
    def act(self, params, carry: Carry) -> tuple[Segment, Carry]:
        """T steps of all environments; the carry's state stays that before them."""
        # Keys and values of the memory, once for all steps of the segment.
        cache = self.model.to_cache(params["trunk"], carry.state)

        def one(loop, key):
            worlds, resets_B, cache = loop
            seen_BO = jax.vmap(observe)(worlds)
            log_p_BTA, _, cache = self(
                params, seen_BO[:, None], resets_B[:, None], cache
            )
            actions_B = jax.random.categorical(key, log_p_BTA[:, 0])
            log_p_B = _of_actions(log_p_BTA, actions_B[:, None])[:, 0]
            worlds, rewards_B, ended_B = jax.vmap(step)(worlds, actions_B)
            stored = seen_BO, resets_B, actions_B, log_p_B, rewards_B, ended_B
            return (worlds, ended_B, cache), stored

        key, *keys = jax.random.split(carry.key, self.settings.segment_length + 1)
        loop = carry.worlds, carry.resets_B, cache
        (worlds, resets_B, _), stored = jax.lax.scan(one, loop, jnp.stack(keys))
        stored = [jnp.swapaxes(x, 0, 1) for x in stored]
        after = jax.vmap(observe)(worlds), resets_B
        segment = Segment(carry.state, *stored, *after)
        return segment, Carry(worlds, resets_B, carry.state, key)

    def collect(self, params, carry: Carry) -> tuple[Segment, Carry]:
        """A segment, and what the next one begins with."""
        segment, carry = self.act(params, carry)
        _, _, state = self.replay(params, segment, segment.state)
        return segment, carry._replace(state=state)


def _of_actions(log_p_BTA, actions_BT):
    return jnp.take_along_axis(log_p_BTA, actions_BT[..., None], axis=2)[..., 0]


# Learning -----------------------------------------------------------------------------


def advantages(agent: Agent, params, segment: Segment):
    """Generalised advantages (Schulman et al. 2016) and what values should be, [B, T].

    Nothing crosses from one episode to the next.
    """
    settings = agent.settings
    _, values_BT, state = agent.replay(params, segment, segment.state)
    after = segment.next_BO[:, None], segment.next_reset_B[:, None]
    _, last_BT, _ = agent(params, *after, state)

    def back(loop, seen):
        later_B, next_B = loop
        reward_B, ended_B, value_B = seen
        goes_on_B = settings.discount * (1 - ended_B)
        error_B = reward_B + goes_on_B * next_B - value_B
        later_B = error_B + settings.trace * goes_on_B * later_B
        return (later_B, value_B), later_B

    seen = [x.T for x in (segment.rewards_BT, segment.ended_BT, values_BT)]
    loop = jnp.zeros_like(last_BT[:, 0]), last_BT[:, 0]
    _, found_TB = jax.lax.scan(back, loop, seen, reverse=True)
    return found_TB.T, values_BT + found_TB.T


def loss(agent: Agent, params, segment: Segment, advantages_BT, returns_BT):
    """PPO's (Schulman et al. 2017): clipped ratio, squared error of values, entropy."""
    clip = agent.settings.clip
    log_p_BTA, values_BT, _ = agent.replay(params, segment, segment.state)
    scaled_BT = (advantages_BT - advantages_BT.mean()) / (advantages_BT.std() + 1e-6)
    log_p_BT = _of_actions(log_p_BTA, segment.actions_BT)
    ratio_BT = jnp.exp(log_p_BT - segment.log_p_BT)
    clipped_BT = jnp.clip(ratio_BT, 1 - clip, 1 + clip)
    gain = jnp.minimum(ratio_BT * scaled_BT, clipped_BT * scaled_BT).mean()
    entropy = -(jnp.exp(log_p_BTA) * log_p_BTA).sum(-1).mean()
    error = jnp.square(values_BT - returns_BT).mean()
    return 0.5 * error - gain - agent.settings.entropy * entropy


def optimizer(settings: Settings):
    return optax.chain(
        optax.clip_by_global_norm(0.5), optax.adam(settings.learning_rate)
    )


@functools.partial(jax.jit, static_argnums=0)
def update(agent: Agent, params, opt_state, segment: Segment, key):
    """All epochs over a segment, in groups of environments."""
    settings = agent.settings
    data = segment, *advantages(agent, params, segment)
    # The model says which axis of its state is that of the rows.
    names = agent.model.state_axes()
    state = jax.tree.map(lambda _, n: n.index("batch"), segment.state, names)
    rows = jax.tree.map(lambda _: 0, data)
    rows = rows[0]._replace(state=state), *rows[1:]

    def one(loop, group_B):
        params, opt_state = loop
        part = jax.tree.map(lambda x, axis: jnp.take(x, group_B, axis), data, rows)
        grads = jax.grad(loss, argnums=1)(agent, params, *part)
        updates, opt_state = optimizer(settings).update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(key, settings.epochs)
    everyone_B = jnp.arange(settings.environments)
    order = jax.vmap(jax.random.permutation, (0, None))(keys, everyone_B)
    groups = order.reshape(settings.epochs * settings.minibatches, -1)
    return jax.lax.scan(one, (params, opt_state), groups)[0]


def train(settings: Settings, seed: int) -> np.ndarray:
    """Mean return of the episodes that ended, and seconds, of each update: [N, 2]."""
    agent, found = Agent(settings), []
    key, init_key, start_key = jax.random.split(jax.random.key(seed), 3)
    params, carry = agent.init(init_key), agent.start(start_key)
    opt_state = optimizer(settings).init(params)
    for n in range(settings.updates):
        begun = time.perf_counter()
        segment, carry = agent.collect(params, carry)
        key_n = jax.random.fold_in(key, n)
        params, opt_state = update(agent, params, opt_state, segment, key_n)
        rewards, ended = jax.device_get((segment.rewards_BT, segment.ended_BT))
        jax.block_until_ready(params)
        mean = rewards.sum() / max(ended.sum(), 1)
        found.append((mean, time.perf_counter() - begun))
    return np.array(found)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    for field in dataclasses.fields(Settings):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    flags = vars(parser.parse_args(argv))
    seeds, settings = map(int, flags.pop("seeds").split(",")), Settings(**flags)
    print(f"mean return of every {EACH} updates; a guess gets {1 / CUES}")
    for seed in seeds:
        found = train(settings, seed)
        curve = [found[n : n + EACH, 0].mean() for n in range(0, len(found), EACH)]
        # Without what was compiled in the first update.
        seconds = np.median(found[1:, 1])
        steps = settings.environments * settings.segment_length
        print(
            f"memory {settings.memory_length}, gate {settings.gate}, seed {seed}:",
            *(f"{mean:.2f}" for mean in curve),
            f"| {steps / seconds:,.0f} steps/s, {found[:, 1].sum():.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    main()
