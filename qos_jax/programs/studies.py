"""The studies of ``qos-jax reproduce``: what is trained, in which worlds who is compared, and what is drawn.

Only declarations; nothing here computes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from qos_jax.worlds.presets import PRESETS

LOADS = (0.6, 0.9, 1.1, 1.3)


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much is spent."""

    requests: int  # of each load and seed
    seeds: int  # of an evaluation
    most_steps: int | None  # of each training seed
    most_training_seeds: int
    ends_only: bool  # of the loads and worlds of a study only the first and the last, and only routers that are drawn


BUDGETS = {
    "quick": Budget(requests=200, seeds=2, most_steps=6_000, most_training_seeds=1, ends_only=True),
    "full": Budget(requests=1_500, seeds=16, most_steps=None, most_training_seeds=10, ends_only=False),
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A router that is trained for the studies, by the recipe of its world but for what is given."""

    preset: str = "paper-3"
    agent: str = "mvr"
    randomise: str = "load,arrivals"
    flags: tuple[str, ...] = ()  # more flags of qos-jax train
    share: float = 1.0  # of the recipe's steps
    seeds: int = 5


def _short(preset: str, *settings: str, share: float = 0.5, **fields: Any) -> Trained:
    """Returns a router that takes half of the recipe's requests: forty gradient steps per chunk learn earlier.

    With the whole recipe it would be better (docs/decisions/018); this is what many variants can be had for.
    """
    flags = (*fields.pop("flags", ()), f"--set={','.join((*settings, 'updates=40'))}")
    return Trained(preset, flags=flags, share=share, **fields)


@dataclasses.dataclass(frozen=True)
class World:
    """A world in which routers are compared."""

    label: str
    preset: str = "paper-3"
    trained: tuple[str, ...] = ()  # of TRAINED and DIALS
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keyword arguments of qos_jax.make
    trace: str | None = None  # file of measured arrivals: an .npz of clients, or a trace, whose second half is taken
    routers: tuple[str, ...] | None = None  # in place of the study's
    share_of_requests: float = 1.0  # of the study's, and
    share_of_seeds: float = 1.0  # of the budget's


@dataclasses.dataclass(frozen=True)
class Study:
    """One question, and the worlds that answer it."""

    title: str
    question: str
    worlds: tuple[World, ...]
    loads: tuple[float, ...] = LOADS
    routers: tuple[str, ...] = ("all",)
    axis: str | None = None  # what differs between the worlds, if QoS is drawn against that and not against load
    share: float = 1.0  # of the budget's requests
    metrics: tuple[str, ...] = ()  # told in its tables beside QoS
    cost: str | None = None  # a metric, if QoS is drawn against that
    hindsight: bool = False  # a plan of who knows the whole trace, and a bound on all plans, take part


_MVR = {"paper-3": ("mvr",), "paper-6": ("mvr_paper_6",), "edge-8": ("mvr_edge_8",)}
_EDGE = {name: (f"mvr_{name.replace('-', '_')}",) for name in ("jetson-4", "edge-2026", "campus-16")}
_STALE = {preset: (name, f"{name}_stale") for preset, (name,) in _MVR.items()}
_NEVER_REFUSING = ("round_robin", "shortest_queue", "bert_router", "vllm_dp", "power_of_two")
_FEW = ("shortest_queue", "round_robin", "bert_router", "bert_router_feasible", "impact_greedy", "oracle_impact")
_AZURE = "AzureLLMInferenceTrace_{}_first_half.csv"
_MEASURED: dict[str, Mapping[str, Any]] = {
    "Azure_conversations": {"trace": _AZURE.format("conv")},
    "Azure_code": {"trace": _AZURE.format("code")},
    "ServeGen_clients": {"trace": "servegen_deepseek-r1.npz"},
}
_SHARES_OF_SEEDS = {"paper-3": 4.0, "paper-6": 2.0}  # where GPUs are equal gains are small
_FAMILIAR = PRESETS["edge-8"].pairs
_TWELVE = (*_FAMILIAR, *PRESETS["paper-6"].pairs[:3], ("llama-7b-hf-baize-lora-bf16", "RTX 4090"))

_STALE_METRICS, _STALE_SETTING = ("--staleness=0.5",), "alpha=0.1"
_ABLATIONS = {
    "complete": Trained(),
    "no_externality_clip": Trained(flags=("--set=max_externality=10",)),
    "no_graph": Trained(agent="mvr_no_graph"),
    "one_layer": Trained(agent="mvr_1_layer"),
    "three_layers": Trained(agent="mvr_3_layers"),
    "no_impact_features": Trained(agent="mvr_no_impact"),
    "no_rates": Trained(agent="mvr_no_rates"),
    "no_residual": Trained(agent="mvr_no_residual"),
    "never_drops": Trained(flags=("--noallow_drop",)),
}
_LEARNERS = {
    "learner_sac": Trained(agent="sac", seeds=10),
    "learner_sac_joint": Trained(agent="sac_joint"),
    # These three stay far below; more seeds and steps would tell nothing new.
    "learner_sac_td0": Trained(agent="sac_td0", share=0.5, seeds=2),
    "learner_baseline_rl": Trained(agent="baseline_rl", share=0.5, seeds=2),
    "learner_paper": Trained(agent="paper", share=0.5, seeds=2),
    "learner_sac_edge_8": Trained("edge-8", agent="sac"),
}
_ENERGY = {
    f"energy_{weight}": _short("edge-8", f"weights.energy={weight}", share=0.2, seeds=1) for weight in (1, 2, 5, 10)
}

TRAINED = {
    "mvr": Trained(seeds=10),
    "mvr_paper_6": Trained("paper-6"),
    "mvr_edge_8": Trained("edge-8"),
    "mvr_jetson_4": _short("jetson-4"),
    "mvr_edge_2026": _short("edge-2026", seeds=10),
    "mvr_campus_16": Trained("campus-16"),
    "mvr_stale": Trained(flags=(*_STALE_METRICS, f"--set={_STALE_SETTING}")),
    "mvr_paper_6_stale": Trained("paper-6", flags=(*_STALE_METRICS, f"--set={_STALE_SETTING}")),
    "mvr_edge_8_stale": _short("edge-8", _STALE_SETTING, flags=_STALE_METRICS),
    "mvr_any_limit": Trained(randomise="load,arrivals,limit"),
    # A network learns few fleets by heart, and each environment has one; see docs/decisions/015.
    "mvr_any_fleet": Trained(
        "edge-8",
        flags=("--set=max_externality=1,num_envs=1024,updates=40",),
        randomise="load,arrivals,fleet,limit",
        share=4.0,
    ),
    "mvr_true_predictions": Trained(flags=("--prediction=perfect",), seeds=3),
    "mvr_edge_8_true_predictions": _short("edge-8", flags=("--prediction=perfect",), seeds=3),
    "mvr_edge_8_any_preferences": _short("edge-8", randomise="load,arrivals,preferences"),
    **{name: dataclasses.replace(one, seeds=2) for name, one in _ABLATIONS.items()},
    **_ENERGY,
    **_LEARNERS,
}

DIALS: dict[str, tuple[str, Mapping[str, float]]] = {
    f"dial_{weight}": ("mvr_edge_8_any_preferences", {"energy": weight}) for weight in (0, 1, 2, 5, 10)
}
"""One of TRAINED with other preferences, for ``World.trained``."""


def _everywhere(
    trained: Mapping[str, tuple[str, ...]], shares: Mapping[str, float] = _SHARES_OF_SEEDS, **laws: Mapping[str, Any]
) -> tuple[World, ...]:
    """Returns each preset, with its routers and share of seeds, under each law."""
    return tuple(
        World(f"{preset}, {label.replace('_', ' ')}", preset, names, share_of_seeds=shares.get(preset, 1.0), **law)
        for preset, names in trained.items()
        for label, law in laws.items()
    )


_planned = functools.partial(World, share_of_seeds=0.25)  # a plan takes minutes


def _varied(field: str, values: Mapping[str, Any], trained: tuple[str, ...] = ("mvr",)) -> tuple[World, ...]:
    return tuple(World(label, trained=trained, fields={field: value}) for label, value in values.items())


STUDIES = {
    "load": Study(
        "QoS against arrival rate",
        "Who earns most as the fleet fills up, with Poisson arrivals and fresh metrics?",
        _everywhere(_MVR, Poisson={}),
        loads=(0.3, *LOADS),
        metrics=("score", "latency_per_token_s", "violation_rate", "drop_rate", "kv_utilisation", "qos_per_gb_s"),
    ),
    "edge": Study(
        "The edge of today",
        "Who earns most on boards and cards of 2026 with LLMs of 4 to 16 bits, where memory binds?",
        _everywhere(_EDGE, Poisson={}),
        loads=(0.5, *LOADS),
        metrics=("score", "ttft_p95_s", "violation_rate", "drop_rate", "kv_utilisation", "preemptions"),
    ),
    "arrivals": Study(
        "Bursts, drifting rates and real traces",
        "Does that hold where arrivals are not Poisson? Traces are Azure's, clients ServeGen's, never trained on.",
        _everywhere(
            _MVR,
            {},  # five laws each: of all studies this one takes longest
            gamma_gaps_of_CV_3={"fields": {"arrivals": "gamma:3"}},
            drifting_rate={"fields": {"arrivals": "sinusoidal:0.5:120"}},
            **_MEASURED,
        ),
    ),
    "edge_arrivals": Study(
        "The edge of today under real arrivals",
        "Does that hold with arrivals that were measured, and never trained on?",
        _everywhere(_EDGE, **_MEASURED),
        loads=(0.5, *LOADS),
        metrics=("score", "ttft_p95_s", "violation_rate", "drop_rate"),
    ),
    "stale": Study(
        "Stale metrics",
        "And where routers see the fleet half a second late? Some learned so, the others never saw it.",
        _everywhere(_STALE, half_a_second_stale={"fields": {"staleness_s": 0.5}}),
    ),
    "staleness": Study(
        "QoS against staleness",
        "How late may metrics be?",
        _varied("staleness_s", {"0.1": 0.1, "0.25": 0.25, "0.5": 0.5, "1": 1.0}, ("mvr", "mvr_stale")),
        loads=(0.9,),
        axis="age of the metrics, s",
    ),
    "limit": Study(
        "QoS against the latency limit",
        "How do routers fare with stricter and looser limits than the paper's 30 ms per token? One learned router was "
        "trained with that limit only, the others with any from 24 to 50 ms, on this fleet and on random ones.",
        _varied(
            "latency_limit_s",
            {"26": 0.026, "28": 0.028, "30": 0.03, "33": 0.033, "36": 0.036, "45": 0.045},
            ("mvr", "mvr_any_limit", "mvr_any_fleet"),
        ),
        loads=(0.9,),
        axis="limit, ms per token",
    ),
    "prediction": Study(
        "QoS against the quality of predictions",
        "What are predictions worth? The scale goes from each expert's mean to the truth.",
        _varied("prediction", {"none": "none", "realistic": "realistic", "r2 .3, .6": "r2:0.3:0.6", "true": "perfect"}),
        loads=(0.9,),
        axis="predictions",
    ),
    "experts": Study(
        "QoS against the number of experts",
        "One checkpoint, trained on random fleets of eight, routes fleets of other sizes that it has not seen.",
        tuple(
            World(str(count), "edge-8", ("mvr_any_fleet",), {"experts": _TWELVE[:count]}) for count in (2, 3, 5, 8, 12)
        ),
        loads=(0.9,),
        routers=_FEW,
        axis="experts",
    ),
    "unseen": Study(
        "One checkpoint for any fleet",
        "How much is lost against a router that was trained where it serves?",
        (
            World("paper-3", "paper-3", ("mvr_any_fleet", "mvr")),
            World("paper-6", "paper-6", ("mvr_any_fleet", "mvr_paper_6")),
            World("edge-8", "edge-8", ("mvr_any_fleet", "mvr_edge_8")),
            World("edge-8 in reverse order", "edge-8", ("mvr_any_fleet", "mvr_edge_8"), {"experts": _FAMILIAR[::-1]}),
            World("12 experts", "edge-8", ("mvr_any_fleet", "mvr_edge_8"), {"experts": _TWELVE}),
            # More requests, as it takes many to fill so large a fleet.
            World("64 experts", "edge-64", ("mvr_any_fleet", "mvr_edge_8"), share_of_requests=4.0, share_of_seeds=0.25),
        ),
        loads=(0.6, 0.9, 1.1),
        routers=_FEW,
    ),
    "planner": Study(
        "Against a planner",
        "How close is the learned router to one that simulates every action ahead, at thousands of times its cost?",
        (World("paper-3", trained=("mvr",)),),
        loads=(0.6, 0.9, 1.1),
        routers=("impact_greedy", "rollout", "oracle_impact"),
        share=0.2,
    ),
    "hindsight": Study(
        "How much is left",
        "Which share of what foresight could gain does each router get? The plan knows the whole trace beforehand.",
        (
            _planned("paper-3", "paper-3", ("mvr",)),
            _planned("edge-8", "edge-8", ("mvr_edge_8",)),
            _planned(
                "paper-3, true predictions", "paper-3", ("mvr", "mvr_true_predictions"), {"prediction": "perfect"}
            ),
            _planned(
                "edge-8, true predictions",
                "edge-8",
                ("mvr_edge_8", "mvr_edge_8_true_predictions"),
                {"prediction": "perfect"},
            ),
        ),
        loads=(0.9,),
        share=1 / 3,
        hindsight=True,
    ),
    "ablations": Study(
        "Ablations",
        "Which part of the learned router earns what?",
        (
            World("paper-3", trained=tuple(name for name in _ABLATIONS if name != "never_drops")),
            World("paper-3, nobody may drop", trained=("never_drops",), fields={"allow_drop": False}),
        ),
        routers=(*_FEW, "impact_greedy_no_drop"),
    ),
    "refusing": Study(
        "Routing or refusing",
        "How much of a gain is the choice of the expert, and how much is refusing requests? With +admission a router "
        "refuses what impact_greedy would refuse, and otherwise decides as before.",
        (
            World("paper-3", trained=("mvr",), share_of_seeds=2.0),
            World(
                "paper-3, nobody may drop",
                trained=("never_drops",),
                fields={"allow_drop": False},
                routers=(*_NEVER_REFUSING, "impact_greedy"),
                share_of_seeds=2.0,
            ),
            World("edge-8", "edge-8", ("mvr_edge_8",)),
        ),
        routers=(
            *_NEVER_REFUSING,
            *(f"{name}+admission" for name in _NEVER_REFUSING),
            "impact_greedy",
            "impact_greedy_no_drop",
        ),
        metrics=("drop_rate",),
    ),
    "learners": Study(
        "Methods of learning",
        "Which method learns queues? Each learns by its recipe from five or ten training seeds; those that fail anyway "
        "from two, and half of the requests.",
        (
            World("paper-3", trained=("mvr", *(name for name in _LEARNERS if not name.endswith("edge_8")))),
            World("edge-8", "edge-8", ("mvr_edge_8", "learner_sac_edge_8")),
        ),
        routers=_FEW,
    ),
    "energy": Study(
        "QoS against energy",
        "What does a lower bill cost? The weight of a kJ in the reward is 1, 2, 5 or 10 QoS.",
        (World("edge-8", "edge-8", ("mvr_edge_8", *_ENERGY)),),
        loads=(0.6, 0.9),
        routers=_FEW,
        metrics=("energy_j_per_request", "qos_per_kj", "violation_rate", "busy_fraction"),
        cost="energy_j_per_request",
    ),
    "dial": Study(
        "One checkpoint, any preference",
        "Does one router that is told the weight of a kJ, 0, 1, 2, 5 or 10 QoS, do what routers do that were trained "
        "with that weight?",
        (World("edge-8", "edge-8", (*DIALS, "mvr_edge_8", *_ENERGY)),),
        loads=(0.6, 0.9),
        routers=_FEW,
        metrics=("energy_j_per_request", "qos_per_kj", "violation_rate", "drop_rate", "busy_fraction"),
        cost="energy_j_per_request",
    ),
}
