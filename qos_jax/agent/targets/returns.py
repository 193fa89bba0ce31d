"""Lambda returns of whole stretches of requests, one stream of rewards for each expert.

A row of the replay buffer is one decision with the lambda returns that followed it. They are computed once, when the
stretch has been simulated, so value travels a whole stretch per chunk and not one request per update.

* **Streams.** Expert n has a value V_n, and an advantage A_n of the placement there over a drop. The answers of other
  experts are not in its stream, and neither is their noise. The last stream is the fleet's total.
* **Opportunity cost.** Where n is crowded, later requests go elsewhere. The stream of n would count them as lost
  although they earn there, and the router would learn to drop. So n pays, for each request that it gets, what the best
  other use of it is worth: ``softmax(A / alpha) . A`` over the other actions. A request that n no longer gets then
  costs n its surplus only, and the gain of a stream is to first order the gain of the fleet under a router that reacts.
* **Orthogonal regression.** The loss fits ``(x - pi)(A - price)`` to the return less V. x is 1 where the request went
  to n, and pi is its probability under the router that acted. As x - pi has mean 0 in every state, errors of V, which
  are several QoS, do not bias A, which is about 0.1 QoS.
* **Copies.** Several copies of an environment receive the same requests and differ in the sampled actions. What befalls
  all copies is subtracted from the return that A is fitted to. It is that of the *other* copies, which do not depend on
  the action, so A stays unbiased (input-driven baselines, arXiv 1807.02264).
* **Potential.** Each stream also earns the change of its expert's predicted QoS in flight. The change is not
  discounted, so an answer is worth the same whenever it ends.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array, lax

from qos_jax.agent import replay_buffer
from qos_jax.agent.networks import Heads, Inputs, heads_of
from qos_jax.agent.preferences import with_preferences
from qos_jax.agent.rewards import expert_returns
from qos_jax.agent.sac import Hyperparameters, LearnerState, policy_logits
from qos_jax.agent.targets.base import Agent, CriticLoss
from qos_jax.errors import InputError
from qos_jax.impact.estimate import expert_in_flight_qos, impact
from qos_jax.sim.batching import map_environments
from qos_jax.sim.env import EnvParams, EnvState, axis_of_environments
from qos_jax.sim.failures import reseeded
from qos_jax.sim.world import advance, collect, dispatch, empty_world
from qos_jax.sim.world_state import World


class Return(struct.PyTreeNode):
    """One decision with the returns that followed it."""

    inputs: Inputs
    action: Array  # [] int32
    policy: Array  # [A] probabilities of the router that acted
    price: Array  # [N] what the best other use of the request is worth
    target: Array  # [N + 1] lambda return of each expert, and of the fleet
    common: Array  # [N + 1] what befell the other copies, to subtract


class _Step(NamedTuple):
    """One request of one environment."""

    row: Return  # with zeros for the targets
    value: Array  # [N + 1] before the decision
    potential: Array  # [N] before the decision
    earned: Array  # [N] until the next request
    discount: Array  # [] of the next request's value
    qos: Array  # []
    dropped: Array  # []


class Returns:
    """Regression on lambda returns; see ``Targets``."""

    def check(self, config: Any) -> None:
        """Raises ``InputError`` if the copies do not fill the environments, or the network has no values."""
        if config.num_envs % config.copies:
            raise InputError(f"num_envs is {config.num_envs}, must be a multiple of the {config.copies} copies")
        if not config.network.value:
            raise InputError("network.value is False, must be True for targets 'returns'")

    def rows_per_chunk(self, config: Any) -> int:
        """Returns one row per request."""
        return int(config.num_envs * config.chunk)

    def requests_per_chunk(self, config: Any, num_experts: int) -> int:
        """Returns ``chunk``."""
        return int(config.chunk)

    def empty_row(self, inputs: Inputs) -> Return:
        """Returns a decision of zeros."""
        actions = jnp.zeros(inputs.legal.shape)
        return Return(inputs, jnp.int32(0), actions, actions[:-1], actions, actions)

    def init(self, agent: Agent, states: Any, inputs: Inputs) -> None:
        """Returns None: nothing is kept beside the environments."""

    def collect(
        self, agent: Agent, state: Any, params: EnvParams, hyper: Hyperparameters, key: Array, chunk: Array
    ) -> tuple[Any, Return, dict[str, Array]]:
        """Routes a stretch of requests in every copy of this chunk's environments.

        With C copies a chunk has every C-th part of the environments; the first copy goes on.
        """
        config = agent.config
        size = config.num_envs // config.copies
        start = chunk % config.copies * size
        key_reset, key_act, key_world = jax.random.split(key, 3)

        def part(tree: Any) -> Any:
            return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), tree)

        def copied(tree: Any) -> Any:
            return jax.tree.map(lambda x: _repeated(x, config.copies), tree)

        own_params = part(params) if axis_of_environments(params) == 0 else None
        its_params = params if own_params is None else own_params
        first = _restarted(agent, its_params, hyper, key_reset, part(state.envs[1]), part(state.warm_state))

        def one(x: tuple[Any, ...]) -> tuple[Any, _Step, Array, Array]:
            key_act, key_world, env, own_params = x
            world = params if own_params is None else own_params
            return _stretch(
                agent,
                world,
                with_preferences(hyper, world),
                state.learner,
                jax.random.split(key_act, config.chunk),
                jax.random.split(key_world, config.chunk),
                env,
            )

        keys = jax.random.split(key_act, config.num_envs), copied(jax.random.split(key_world, size))
        last, steps, target, value = map_environments(one, (*keys, copied(first), copied(own_params)))
        error = target - value
        common = _of_other_copies(error, config.copies)
        rows = steps.row.replace(target=target, common=common)
        rows = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), rows)
        envs = jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new[:: config.copies], start, 0),
            state.envs[1],
            last,
        )
        metrics = {
            "qos": jnp.mean(steps.qos),
            "dropped": jnp.mean(steps.dropped),
            "value": jnp.mean(value[..., -1]),
            "error_sd": jnp.std(error[..., :-1]),
            "error_sd_centred": jnp.std((error - common)[..., :-1]),
            "error_sd_total": jnp.std(error[..., -1]),
            "error_sd_total_centred": jnp.std((error - common)[..., -1]),
        }
        return state.replace(envs=(state.envs[0], envs)), rows, metrics

    def batch(self, config: Any, ring: Return, key: Array, oldest: Array, filled: Array) -> Return:
        """Samples from all rows."""
        rows = replay_buffer.rows_at(ring, jax.random.randint(key, (config.batch_size,), 0, filled))
        return rows.replace(inputs=replay_buffer.to_single_precision(rows.inputs))

    def critic_loss(
        self, network: nn.Module, hyper: Hyperparameters, state: LearnerState, batch: Return
    ) -> tuple[Inputs, CriticLoss]:
        """Returns the squared errors of the values and of the advantages, the latter by expert and in total."""
        num_experts = batch.price.shape[-1]
        taken = (jnp.arange(num_experts)[None] == batch.action[:, None]).astype(batch.policy.dtype)
        surprise = (taken - batch.policy[:, :-1])[:, None]  # [B, 1, N]

        def loss(heads: Heads) -> Array:
            error = batch.target[:, None] - _values(heads)  # [B, 2, N + 1]
            centred = lax.stop_gradient(error) - batch.common[:, None]
            advantage = heads.q[..., :-1]
            by_expert = surprise * (advantage - hyper.opportunity_cost * batch.price[:, None]) - centred[..., :-1]
            total = jnp.sum(surprise * advantage, -1) - centred[..., -1]
            fit = (1.0 - hyper.joint) * jnp.sum(jnp.square(by_expert), -1) + hyper.joint * jnp.square(total)
            return jnp.mean(fit) + jnp.mean(jnp.square(error))

        return batch.inputs, loss


def lambda_returns(reward: Array, discount: Array, value: Array, decay: Array | float) -> Array:
    """Returns the lambda returns [T, K] of a stretch of T steps.

    Args:
      reward: [T, K] of K streams.
      discount: [T] of the value after each step.
      value: [T + 1, K] before each step, and at the end.
      decay: lambda; with 0 the return of one step, with 1 that of the whole stretch.
    """

    def step(following: Array, x: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        reward, discount, value = x
        found = reward + discount * (value + decay * (following - value))
        return found, found

    reward, discount = reward.astype(value.dtype), discount.astype(value.dtype)  # gaps may have 64 bits
    _, returns = lax.scan(step, value[-1], (reward, discount, value[1:]), reverse=True)
    return returns


def opportunity_cost(advantage: Array, legal: Array, log_alpha: Array) -> Array:
    """Returns what the best other use of the request is worth, for each expert [N].

    Args:
      advantage: [A] of each action over the drop.
      legal: [A] bool.
      log_alpha: [] logarithm of the temperature.
    """
    num_actions, advantage = advantage.shape[-1], advantage[None]
    other = legal[None] & ~jnp.eye(num_actions, dtype=bool)[:-1]
    share = jax.nn.softmax(jnp.where(other, advantage / jnp.exp(log_alpha), -1e9))
    return jnp.sum(share * jnp.where(other, advantage, 0.0), -1)


def _values(heads: Heads) -> Array:
    assert heads.value is not None, "checked by ``Returns.check``"
    return heads.value


def _stretch(
    agent: Agent,
    params: EnvParams,
    hyper: Hyperparameters,
    learner: LearnerState,
    keys_act: Array,
    keys_world: Array,
    state: EnvState,
) -> tuple[EnvState, _Step, Array, Array]:
    """Routes requests in one environment.

    Returns:
      The state after them, the steps [T], the lambda returns [T, N + 1], and the values before each step [T, N + 1].
    """
    num_experts = agent.env.spec.num_experts

    def seen(state: EnvState) -> tuple[Any, Inputs, Heads]:
        obs = agent.env.observe(state, params)
        inputs = agent.features(obs)
        return obs, inputs, heads_of(agent.network, learner.average, inputs)

    def step(state: EnvState, keys: tuple[Array, Array]) -> tuple[EnvState, _Step]:
        obs, inputs, heads = seen(state)
        logits = policy_logits(heads, inputs.legal, learner.log_alpha)
        action = jax.random.categorical(keys[0], logits).astype(jnp.int32)
        price = opportunity_cost(jnp.mean(heads.q, -2), inputs.legal, learner.log_alpha)
        zeros = jnp.zeros(num_experts + 1)
        row = Return(replay_buffer.to_half_precision(inputs), action, jnp.exp(logits), price, zeros, zeros)
        state, earned, discount, qos, dropped = _advanced(agent, params, hyper, keys[1], obs, state, action)
        value = jnp.mean(_values(heads), -2)
        return state, _Step(row, value, expert_in_flight_qos(obs), earned, discount, qos, dropped)

    state, steps = lax.scan(step, state, (keys_act, keys_world))
    obs, _, heads = seen(state)
    value = jnp.concatenate([steps.value, jnp.mean(_values(heads), -2)[None]])
    potential = jnp.concatenate([steps.potential, expert_in_flight_qos(obs)[None]])
    gain = steps.earned + hyper.weights.potential * hyper.weights.score * jnp.diff(potential, axis=0)
    taken = jnp.arange(num_experts)[None] == steps.row.action[:, None]
    net = gain - hyper.opportunity_cost * jnp.where(taken, steps.row.price, 0.0)
    reward = jnp.concatenate([net, jnp.sum(gain, -1, keepdims=True)], -1)
    return state, steps, lambda_returns(reward, steps.discount, value, hyper.trace_decay), steps.value


def _advanced(
    agent: Agent, params: EnvParams, hyper: Hyperparameters, key: Array, obs: Any, state: EnvState, action: Array
) -> tuple[EnvState, Array, Array, Array, Array]:
    """Sends the request and advances to the next one.

    Returns:
      The state, what each expert earned [N], the discount [], the QoS [] of the answers, and whether it was dropped [].
    """
    spec, weights = agent.env.spec, hyper.weights
    world, dropped = dispatch(spec, params.experts, state.world, state.request, action)
    gap_s, request, workload = params.workload.next(key, state.workload)
    world = advance(spec, params.experts, world, gap_s)
    earned = expert_returns(params.experts, world.experts, weights, hyper.width_s)
    # A drop belongs to no expert, so a placement earns what a drop would cost.
    placed = (jnp.arange(spec.num_experts) == action) & ~dropped
    earned += jnp.where(placed, weights.drop + weights.predicted_loss * impact(obs).qos_change, 0.0)
    world, completions = collect(params.experts, world)
    discount = hyper.gamma * jnp.exp(-gap_s / hyper.discount_s)
    return (
        EnvState(state.time + 1, world, request, workload),
        earned,
        discount,
        completions.qos,
        dropped.astype(jnp.float32),
    )


def _restarted(
    agent: Agent, params: EnvParams, hyper: Hyperparameters, key: Array, states: EnvState, warm_states: EnvState
) -> EnvState:
    """Returns the states [E], of which some are reset: to that after the warm-up, or to empty experts."""

    def idle(params: EnvParams) -> World:
        return empty_world(agent.env.spec, params.experts, params.scrape_s)

    chance = jax.random.uniform(key, states.time.shape)
    nothing = idle(params) if axis_of_environments(params) is None else jax.vmap(idle)(params)
    failures = states.world.failures
    others = states.world.replace(failures=None)
    empty = jax.tree.map(lambda one, many: jnp.broadcast_to(one, many.shape), nothing, others)

    def chosen(state: Array, warm: Array, empty: Array) -> Array:
        shape = -1, *[1] * (state.ndim - 1)
        is_warm = (chance < hyper.reset_prob).reshape(shape)
        is_empty = (chance > 1.0 - hyper.empty_prob).reshape(shape)
        return jnp.where(is_warm, warm, jnp.where(is_empty, empty, state))

    restarted = jax.tree.map(chosen, states, warm_states, states.replace(world=empty.replace(failures=failures)))
    failures = reseeded(restarted.world.failures, key)
    return restarted.replace(world=restarted.world.replace(failures=failures))


def _repeated(x: Array, copies: int) -> Array:
    """Repeats each element of the first axis; ``jnp.repeat`` scatters."""
    return jnp.broadcast_to(x[:, None], (len(x), copies, *x.shape[1:])).reshape(-1, *x.shape[1:])


def _of_other_copies(error: Array, copies: int) -> Array:
    """Returns the mean error of the other copies, like ``error`` [E, ...], in which copies are adjacent; 0 of one."""
    if copies == 1:
        return jnp.zeros_like(error)
    grouped = error.reshape(-1, copies, *error.shape[1:])
    others = jnp.sum(grouped, 1, keepdims=True) - grouped
    return (others / (copies - 1)).reshape(error.shape)
