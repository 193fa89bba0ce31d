"""Changes of a world, and what becomes of orders and claims; no program is compiled here."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qos_jax.evaluation import robustness
from qos_jax.evaluation.evaluate import Scenario
from qos_jax.evaluation.robustness import TABLES, Amounts, Change, changes, scaled, with_engine
from qos_jax.fleet.experts import experts_of
from qos_jax.fleet.profiles import expert_profile
from qos_jax.programs import choices
from qos_jax.report.robustness_page import robustness_markdown
from qos_jax.sim.types import ExpertProfile
from qos_jax.worlds.config import WorldConfig
from tests.helpers.small_env import small_experts

PAPER_3 = WorldConfig("paper-3")
NOISE = np.array([-0.002, -0.001, 0.001, 0.002])  # of four seeds; an interval has about 0.003 on either side


def by_label(world: WorldConfig = PAPER_3, **options: object) -> dict[str, Change]:
    return {change.label: change for change in changes(world, small_experts(), Amounts(), seeds=16, **options)}  # type: ignore[arg-type]


def table(*levels: float) -> np.ndarray:
    """QoS [R, 1, 4] of routers at these levels; their differences have a spread over the seeds."""
    return np.array([[level + place * NOISE] for place, level in enumerate(levels)])


def test_the_words_of_the_help_are_those_of_the_code() -> None:
    assert (choices.CHANGES, choices.BELIEFS) == (robustness.GROUPS, robustness.BELIEFS)


def test_a_factor_changes_its_field_and_nothing_else() -> None:
    experts = small_experts(kv_blocks=np.array([40, 41, 4]))
    changed = scaled(experts, {"step_base_s": 1.1, "kv_blocks": 0.9})
    assert changed.kv_blocks.tolist() == [36, 37, 4]  # whole, and rounded
    np.testing.assert_allclose(changed.step_base_s, 1.1 * np.asarray(experts.step_base_s), rtol=1e-6)
    for field in (field for field in dataclasses.fields(ExpertProfile) if field.name not in ("kernels", "cards")):
        before, after = getattr(experts, field.name), getattr(changed, field.name)
        # With another type or a weak one the evaluation of the unchanged world could not be reused.
        assert (after.dtype, after.weak_type, after.shape) == (before.dtype, before.weak_type, before.shape)
        if field.name not in ("step_base_s", "kv_blocks"):
            np.testing.assert_array_equal(after, before)


def test_measured_tables_are_changed_where_they_make_the_time() -> None:
    experts = expert_profile([("llama-3.1-8b", "RTX 4090")])
    found = changes(WorldConfig("golden-rtx4090"), experts, Amounts(), groups=["coefficients"], seeds=16)
    assert [change.label for change in found[:10:2]] == [f"{name} -10 %" for name in TABLES]
    (worse,) = (change for change in found if change.label == "all 10 % worse")
    before, after = experts.kernels, scaled(experts, worse.factors).kernels
    assert before is not None
    for name in ("dense_s", "head_s", "attention_s"):
        np.testing.assert_allclose(getattr(after, name), 1.1 * getattr(before, name), rtol=1e-6)
    np.testing.assert_array_equal(after.dense_tokens, before.dense_tokens)
    told = changes(WorldConfig("golden-rtx4090"), experts, Amounts(), groups=["coefficients"], belief="true", seeds=16)
    assert {change.label for change in told if change.told} == {
        f"{label}, told" for label in ("kv_blocks -10 %", "kv_blocks +10 %", "all 10 % worse", "all 10 % better")
    }  # no router observes the tables
    assert worse.factors["step_base_s"] == pytest.approx(1.1)  # but all observe their summary


def test_memory_keeps_a_block() -> None:
    assert scaled(small_experts(kv_blocks=1), {"kv_blocks": 0.1}).kv_blocks.tolist() == [1, 1, 1]


def test_an_engine_brings_its_switches_and_its_budget() -> None:
    pairs = (("alpaca-native", "A40"), ("alpaca-native", "H100"))
    fleet = experts_of(pairs)
    changed = with_engine(small_experts(2), fleet, "vllm")
    assert (changed.async_scheduling.tolist(), changed.prefix_cache.tolist()) == ([True, True], [True, True])
    assert changed.token_budget.tolist() == [2048, 8192]
    back = with_engine(changed, fleet, "vllm-sync")
    assert (back.async_scheduling.tolist(), back.token_budget.tolist()) == ([False, False], [2048, 2048])
    np.testing.assert_array_equal(back.step_base_s, small_experts(2).step_base_s)


def test_a_world_is_changed_to_what_it_is_not() -> None:
    assert {"engine vllm", "predictions none", "predictions perfect", "arrivals gamma:2"} < set(by_label())
    other = by_label(WorldConfig("edge-8", prediction="none", arrivals="gamma:3"))
    assert {"engine vllm-sync", "predictions realistic", "arrivals poisson"} < set(other)
    assert "predictions none" not in other


def test_everything_worse_is_slower_with_less_memory() -> None:
    found = by_label(groups=["coefficients"])
    assert len(found) == 14
    assert found["all 10 % worse"].factors["step_base_s"] == pytest.approx(1.1)
    assert found["all 10 % worse"].factors["kv_blocks"] == pytest.approx(0.9)
    assert found["all 10 % better"].factors["per_kv_token_s"] == pytest.approx(0.9)


def test_only_of_the_profile_routers_can_be_told() -> None:
    stale, true, both = (by_label(belief=belief) for belief in ("stale", "true", "both"))
    assert not any(change.told for change in stale.values())
    assert {label for label in stale if f"{label}, told" in true} == set(by_label(groups=["coefficients", "engine"]))
    assert set(both) == {*stale, *true}


def test_the_clock_changes_rates_but_not_what_load_is_believed() -> None:
    scenario = Scenario(load=0.9, rate_per_s=20.0, seed=1000)
    assert by_label()["arrival rate +5 %"].scenario(scenario) == Scenario(0.9, 21.0, 1000)
    assert by_label()["other requests"].scenario(scenario) == Scenario(0.9, 20.0, 1016)


@pytest.mark.parametrize("belief", ["stale", "true"])
def test_routers_observe_the_profile_that_they_believe_in(belief: str) -> None:
    _, params = PAPER_3.build()
    (change,) = (change for label, change in by_label(belief=belief).items() if label.startswith("step_base_s +10 %"))
    changed = change.params(PAPER_3, params)
    slower = np.float32(1.1) * params.experts.step_base_s
    np.testing.assert_allclose(changed.experts.step_base_s, slower, rtol=1e-6)
    observed = slower if belief == "true" else params.experts.step_base_s
    np.testing.assert_allclose(changed.observed_experts.step_base_s, observed, rtol=1e-6)


def test_orders_are_kept_left_undecided_or_reversed() -> None:
    names, loads = ["first", "second", "third"], [0.9]
    before = table(0.60, 0.58, 0.5801)  # the order of the last two is not decided
    assert [(row["better"], row["worse"]) for row in robustness.orders(names, loads, before, before)] == [
        ("first", "second"),
        ("first", "third"),
    ]
    found = robustness.orders(names, loads, before, table(0.60, 0.62, 0.6001))
    assert [row["outcome"] for row in found] == ["reversed", "undecided"]
    assert found[0]["before"]["mean"] == pytest.approx(0.02)
    assert found[0]["after"]["mean"] == pytest.approx(-0.02)


def test_a_gain_is_over_whichever_heuristic_is_best() -> None:
    kinds = {"mvr": "learned", "quick": "heuristic", "slow": "heuristic"}
    before = table(0.60, 0.59, 0.50)
    (claim,) = robustness.claims(kinds, [0.9], before, table(0.60, 0.55, 0.62))
    assert (claim["against_before"], claim["against_after"], claim["outcome"]) == ("quick", "slow", "reversed")
    (kept,) = robustness.claims(kinds, [0.9], before, table(0.60, 0.55, 0.50))
    assert (kept["outcome"], kept["after"]["mean"]) == ("kept", pytest.approx(0.05))
    (still,) = robustness.claims(kinds, [0.9], table(0.60, 0.6001, 0.5), before)
    assert still["outcome"] == "open"
    (loss,) = robustness.claims(kinds, [0.9], table(0.58, 0.60, 0.5), table(0.57, 0.60, 0.5))
    assert loss["outcome"] == "kept"  # also a loss is a claim


def test_without_a_learned_router_the_best_heuristic_is_compared_with_the_others() -> None:
    kinds = {"slow": "heuristic", "quick": "heuristic"}
    (claim,) = robustness.claims(kinds, [0.9], table(0.5, 0.6), table(0.5, 0.6))
    assert (claim["router"], claim["against_before"]) == ("quick", "slow")
    assert not robustness.claims({"slow": "heuristic"}, [0.9], table(0.5), table(0.5))


def test_one_seed_decides_nothing() -> None:
    one = table(0.6, 0.5)[..., :1]
    assert not robustness.orders(["first", "second"], [0.9], one, one)
    (claim,) = robustness.claims({"first": "learned", "second": "heuristic"}, [0.9], one, one)
    assert claim["outcome"] == "open"


def test_rank_correlations_are_by_load() -> None:
    before = np.concatenate([table(0.6, 0.5, 0.4), table(0.6, 0.5, 0.4)], axis=1)
    after = np.concatenate([table(0.6, 0.5, 0.4), table(0.4, 0.5, 0.6)], axis=1)
    assert robustness.rank_correlations(before, after) == pytest.approx([1.0, -1.0])
    assert np.isnan(robustness.rank_correlations(before[:1], after[:1])).all()


def test_the_page_tells_what_was_reversed() -> None:
    kinds = {"mvr": "learned", "round_robin": "heuristic"}
    tables = {"unchanged": table(0.60, 0.58), "arrival rate +5 %": table(0.55, 0.57)}
    worlds = [
        {
            "label": label, "qos": {name: {"0.9": float(qos[place].mean())} for place, name in enumerate(kinds)},
            "rank_correlation": dict(zip(["0.9"], robustness.rank_correlations(tables["unchanged"], qos), strict=True)),
            "orders": robustness.orders(list(kinds), [0.9], tables["unchanged"], qos),
            "claims": robustness.claims(kinds, [0.9], tables["unchanged"], qos),
        }
        for label, qos in tables.items()
    ]  # fmt: skip
    page = robustness_markdown(
        {"config": {}, "command": "qos-jax robustness", "date": "today", "versions": {}}
        | {"kinds": kinds, "pairs": 1, "worlds": worlds},
        "paper-3",
    )
    assert "excludes 0 for 1 of 1 pairs" in page
    assert "| arrival rate +5 % | -1.00 | 0 | 0 | 1 | 0 of 1 |" in page
    reversal = "+0.020 [+0.017, +0.023], now -0.020 [-0.023, -0.017]"
    assert f"- arrival rate +5 %, load 0.9: MVR (learned) over round robin {reversal}" in page
    assert "| arrival rate +5 % | 0.550 | 0.570 |" in page
