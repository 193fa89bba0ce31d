"""Routers, laws of arrivals, networks and targets that users register or name on the command line."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import struct
from jax import Array

import qos_jax
from qos_jax import InputError, Observation, Router, load_router, make, make_router, router_names
from qos_jax.agent import Learner, networks, targets
from qos_jax.agent.networks import FlatInputs, Heads, NetworkConfig
from qos_jax.agent.targets.temporal_difference import TemporalDifference
from qos_jax.encoder.flat import flat_view
from qos_jax.routers.base import by_value
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.training.config import TrainingConfig
from qos_jax.training.run_config import make_config
from qos_jax.training.run_folder import RunFolder
from qos_jax.workload import arrivals
from qos_jax.workload.arrivals import ArrivalProcess, parse_arrivals, quantile_grid, renewal
from qos_jax.worlds.randomization import Domain, sample_worlds
from tests.helpers.instant_env import instant_env, small_learner
from tests.helpers.quick_compilation import quick_compilation
from tests.helpers.small_env import small_env, small_params

ENV = small_env(3)


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """Forgets what a test registers."""
    with (
        mock.patch.dict(qos_jax.routers._registered),
        mock.patch.dict(arrivals._LAWS),
        mock.patch.dict(networks._NETWORKS),
        mock.patch.dict(targets._TARGETS),
    ):
        yield


def last_expert(env: Environment, params: EnvParams) -> Router:
    """Prefers the expert with the highest index."""
    del params
    return by_value("any", lambda obs: jnp.arange(env.spec.num_experts))


class TestRouters:
    def test_a_registered_router_is_made_by_name_for_its_world(self) -> None:
        qos_jax.register_router("last", last_expert)
        router = make_router("last", ENV, small_params())
        obs, _ = jax.jit(ENV.reset)(jax.random.key(0), small_params())
        assert (router.name, int(router.act(jax.random.key(0), obs, router.init())[0])) == ("last", 2)
        assert "last" in router_names(ENV)

    def test_a_later_registration_replaces_an_earlier_one(self) -> None:
        qos_jax.register_router("last", last_expert)
        qos_jax.register_router("last", lambda env, params: make_router("random", env))
        assert make_router("last", ENV, small_params()).act.__qualname__.startswith("random")

    @pytest.mark.parametrize("name", ["random", "rollout", "all", "expert_7", "a:b", "runs/a", "a,b", ""])
    def test_names_of_the_library_and_of_other_forms_are_refused(self, name: str) -> None:
        with pytest.raises(InputError, match=r"choose another name|letters, digits and underscores"):
            qos_jax.register_router(name, last_expert)

    def test_a_registered_router_needs_its_world(self) -> None:
        qos_jax.register_router("last", last_expert)
        with pytest.raises(InputError, match="router 'last' is made for a world: give env and params"):
            make_router("last", ENV)

    def test_a_factory_may_be_named_by_its_module(self, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
        (tmp_path / "own_routers.py").write_text(
            "from qos_jax.routers.base import by_value\n"
            "class Some:\n"
            "    def least_kv(env, params):\n"
            "        return by_value('own_least_kv', lambda obs: -obs.experts.kv_used_blocks)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        assert make_router("own_routers:Some.least_kv", ENV, small_params()).name == "own_least_kv"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no_such_module:factory", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
            ("bad_routers:absent", "cannot be imported: AttributeError"),
            ("bad_routers:", "must be of the form package.module:name"),
            (":factory", "must be of the form package.module:name"),
            ("broken_routers:factory", "cannot be imported: ZeroDivisionError: two lines"),
            ("bad_routers:raises", "its factory failed: KeyError: 'x'"),
            ("bad_routers:number", "its factory failed: TypeError"),
            ("bad_routers:wrong", "its factory returned int, must return a Router"),
        ],
    )
    def test_one_line_says_what_failed(self, name: str, message: str, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
        (tmp_path / "broken_routers.py").write_text("raise ZeroDivisionError('two\\nlines')\n")
        (tmp_path / "bad_routers.py").write_text(
            "number = 1\nwrong = lambda env, params: 1\ndef raises(env, params):\n    return {}['x']\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(InputError) as error:
            make_router(name, ENV, small_params())
        assert message in str(error.value)
        assert repr(name) in str(error.value)
        assert "\n" not in str(error.value)


def weibull(rate_per_s: float, shape: float, stretch: float = 1.0) -> ArrivalProcess:
    return renewal(rate_per_s, stretch * quantile_grid() ** (1 / shape))


@struct.dataclass
class Pairs:
    """Requests that arrive two at a time: a law with a structure of its own."""

    rate_per_s: Array

    def with_rate(self, rate_per_s: Any) -> Pairs:
        return self.replace(rate_per_s=jnp.asarray(rate_per_s, jnp.float32))  # type: ignore[attr-defined]

    def init(self, key: Array) -> Array:
        return jnp.int32(0)

    def next_gap(self, key: Array, state: Array) -> tuple[Array, Array]:
        return jnp.where(state == 0, 2.0 * jax.random.exponential(key) / self.rate_per_s, 0.0), 1 - state


class TestArrivals:
    def test_a_registered_law_is_read_like_a_built_in_one(self) -> None:
        qos_jax.register_arrivals("weibull", weibull)
        jax.tree.map(np.testing.assert_array_equal, parse_arrivals("weibull:0.8", 7.0), weibull(7.0, 0.8))
        jax.tree.map(np.testing.assert_array_equal, parse_arrivals("weibull:0.8:2", 7.0), weibull(7.0, 0.8, 2.0))
        _, params = make("paper-3", rate_per_s=3.0, arrivals="weibull:0.8")
        assert float(params.workload.arrivals.rate_per_s) == 3.0  # type: ignore[attr-defined]

    @pytest.mark.parametrize("text", ["weibull", "weibull:1:2:3", "weibull:", "weibull:x", "other"])
    def test_errors_say_how_it_is_written(self, text: str) -> None:
        qos_jax.register_arrivals("weibull", weibull)
        with pytest.raises(InputError, match=r"legal is poisson, .*, weibull:SHAPE\[:STRETCH\]"):
            parse_arrivals(text, 1.0)

    def test_a_renewal_law_mixes_with_built_in_laws_in_randomised_worlds(self) -> None:
        qos_jax.register_arrivals("weibull", weibull)
        env, params = make("paper-3", load=0.9)
        worlds = sample_worlds(env, params, Domain(arrivals=("weibull:0.8", "gamma:2")), jax.random.key(0), 8)
        quantiles = np.unique(np.asarray(worlds.workload.arrivals.gap_quantiles), axis=0)  # type: ignore[attr-defined]
        assert len(quantiles) == 2

    def test_another_pytree_runs_under_vmap_at_other_rates(self) -> None:
        qos_jax.register_arrivals("pairs", lambda rate_per_s: Pairs(jnp.float32(rate_per_s)))
        _, params = make("paper-3", load=0.8, arrivals="pairs")

        @jax.jit
        @jax.vmap
        def gaps_s(load: Array) -> Array:
            """Returns 200 gaps at a load."""
            workload = params.at_load(load).workload

            def step(state: Any, key: Array) -> tuple[Any, Array]:
                gap_s, _, state = workload.next(key, state)
                return state, gap_s

            keys = jax.random.split(jax.random.key(0), 201)
            return jax.lax.scan(step, workload.init(keys[0]), keys[1:])[1]

        slow, fast = np.asarray(gaps_s(jnp.array([0.4, 0.8])))
        np.testing.assert_allclose(slow, 2.0 * fast, rtol=1e-5)
        assert not slow[1::2].any()
        assert slow.mean() == pytest.approx(1 / (0.4 * float(params.saturation_per_s)), rel=0.3)

    @pytest.mark.parametrize("name", ["gamma", "a:b", ""])
    def test_built_in_names_and_other_forms_are_refused(self, name: str) -> None:
        with pytest.raises(InputError, match=r"is built in: choose another name|letters, digits and underscores"):
            qos_jax.register_arrivals(name, weibull)

    def test_a_parser_must_return_arrivals(self) -> None:
        qos_jax.register_arrivals("wrong", lambda rate_per_s: rate_per_s)  # type: ignore[arg-type, return-value]
        with pytest.raises(InputError, match="arrivals 'wrong': its parser returned float, must return Arrivals"):
            parse_arrivals("wrong", 1.0)


class Linear(nn.Module):
    """Values that are linear in the flat view."""

    @nn.compact
    def __call__(self, inputs: FlatInputs) -> Heads:
        q = nn.Dense(2 * inputs.legal.shape[-1])(inputs.columns)
        return Heads(None, q.reshape(*q.shape[:-1], 2, -1))


def linear(config: NetworkConfig) -> tuple[networks.Features, nn.Module]:
    del config
    return lambda obs: FlatInputs(flat_view(obs), obs.action_mask), Linear()


class Huber(TemporalDifference):
    """Temporal differences with the Huber loss."""

    def critic_loss(self, network: Any, hyper: Any, state: Any, batch: Any) -> Any:
        target = targets.temporal_difference.bootstrapped_value(network, hyper, state, batch)
        taken = jnp.arange(batch.transition.inputs.legal.shape[-1]) == batch.transition.action[:, None]

        def loss(heads: Heads) -> Array:
            error = optax.huber_loss(heads.q, target[:, None, None])
            return jnp.mean(jnp.where(taken[:, None], error, 0.0))

        return batch.transition.inputs, loss


def own_learner() -> Learner:
    return small_learner(network=NetworkConfig("linear"), targets="huber")


@functools.cache
def trained_once() -> Any:
    """The state after one chunk, and its metrics."""
    learner, params = own_learner(), small_params()
    hyper = jax.tree.map(jnp.float32, learner.config.hyper)

    @jax.jit
    def train(key: Array) -> Any:
        state = learner.warm_up(learner.init(key, params, hyper), params, hyper)
        return learner.train_chunk(state, params, hyper, jnp.int32(0), jnp.float32(0))

    return train(jax.random.key(0))


class TestAgents:
    @pytest.fixture
    def trained(self, tmp_path: pathlib.Path) -> tuple[pathlib.Path, Router]:
        """The folder and the router of a run with a network and targets of the user's, after one chunk."""
        qos_jax.register_network("linear", linear)
        qos_jax.register_targets("huber", Huber())
        learner, (state, metrics) = own_learner(), trained_once()
        assert np.isfinite(metrics["critic_loss"])
        folder = RunFolder.start(tmp_path / "run", make_config(learner, TrainingConfig(learner.config)))
        folder.save(32, state, learner.weights(state))
        return folder.path, learner.router(learner.weights(state))

    def test_load_router_rebuilds_the_agent(self, trained: tuple[pathlib.Path, Router]) -> None:
        path, router = trained
        loaded = load_router(path)
        reset, params = instant_env().reset, small_params()

        @jax.jit
        @jax.vmap
        def actions(key: Array) -> tuple[Array, Array]:
            obs: Observation = reset(key, params)[0]
            return loaded.act(key, obs, ())[0], router.act(key, obs, ())[0]

        np.testing.assert_array_equal(*actions(jax.random.split(jax.random.key(0), 5)))

    @pytest.mark.parametrize(
        ("registry", "name", "message"),
        [
            (
                networks._NETWORKS,
                "linear",
                "encoder 'linear' is not known: register it first (qos_jax.register_network",
            ),
            (targets._TARGETS, "huber", "targets 'huber' are not known: register them first (qos_jax.register_targets"),
        ],
    )
    def test_without_registration_one_line_says_what_to_do(
        self, trained: tuple[pathlib.Path, Router], registry: dict[str, Any], name: str, message: str
    ) -> None:
        del registry[name]
        with pytest.raises(InputError) as error:
            load_router(trained[0])
        assert message in str(error.value)
        assert "config.json" in str(error.value)
        assert "\n" not in str(error.value)

    def test_rates_are_clipped_for_registered_networks_too(self) -> None:
        qos_jax.register_network("linear", linear)
        obs, _ = jax.jit(ENV.reset)(jax.random.key(0), small_params())
        fast = obs.replace(arrived=obs.arrived.replace(recent_rate_per_s=jnp.full(3, 90.0)))
        at_clip = obs.replace(arrived=obs.arrived.replace(recent_rate_per_s=jnp.full(3, 12.0)))
        features = networks.network_of(NetworkConfig("linear", rate_clip_per_s=4.0))[0]
        np.testing.assert_array_equal(features(fast).columns, features(at_clip).columns)

    def test_built_in_networks_are_kept(self) -> None:
        with pytest.raises(InputError, match="network 'han' is built in: choose another name"):
            qos_jax.register_network("han", linear)

    def test_a_configuration_with_a_registered_name_survives_its_file(self) -> None:
        qos_jax.register_network("linear", linear)
        qos_jax.register_targets("huber", Huber())
        config = TrainingConfig(own_learner().config)
        assert TrainingConfig.from_dict(config.to_dict()) == config
        assert dataclasses.replace(config.agent.network, slots=4).encoder == "linear"
