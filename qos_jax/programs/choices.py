"""Names for the help of programs, as they may not import JAX to find them out; a test holds them to the registries."""

from __future__ import annotations

PRESETS = ("paper-3", "paper-6", "edge-8", "edge-64", "golden-rtx4090", "jetson-4", "edge-2026", "campus-16")
ENGINES = ("vllm", "vllm-sync")
OBSERVE = ("engine", "proxy")
AGENTS = (
    "mvr",
    "mvr_no_graph",
    "mvr_no_impact",
    "mvr_no_rates",
    "mvr_no_residual",
    "mvr_1_layer",
    "mvr_3_layers",
    "sac",
    "sac_joint",
    "sac_td0",
    "sac_paper_reward",
    "paper",
    "baseline_rl",
)
MAIN_ROUTERS = (
    "round_robin",
    "shortest_queue",
    "vllm_dp",
    "latency_headroom",
    "bert_router",
    "bert_router_feasible",
    "impact_greedy",
    "impact_greedy_equal_gpus",
    "impact_greedy_no_drop",
    "oracle_impact",
)
"""The routers that `make run` compares."""

ARENA_ROUTERS = (
    "round_robin",
    "power_of_two",
    "shortest_queue",
    "vllm_dp_2026",
    "score_threshold",
    "multi_factor",
    "route_balance",
    "latency_scorer",
    "prefix_affinity",
    "bert_router_feasible",
    "impact_greedy",
    "impact_greedy_later_prompts",
    "oracle_impact",
)
"""The baselines of the arena."""

ARENA_WORLDS = {
    "paper-3": "--preset=paper-3",
    "paper-3-bursts": "--preset=paper-3 --arrivals=gamma:3",
    "paper-6": "--preset=paper-6",
    "edge-8": "--preset=edge-8",
    "jetson-4": "--preset=jetson-4",
    "edge-2026": "--preset=edge-2026",
    "campus-16": "--preset=campus-16",
}
"""The worlds of the arena, by the flags that make them."""

ROUTERS = (
    *MAIN_ROUTERS,
    "random",
    "shortest_tokens",
    "least_kv",
    "power_of_two",
    "vllm_dp_2026",
    "score_threshold",
    "multi_factor",
    "route_balance",
    "latency_scorer",
    "prefix_affinity",
    "impact_greedy_later_prompts",
    "oracle_score",
    "rollout",
)
AGENT_FIELDS = (
    "network.encoder",
    "network.readout",
    "network.actor",
    "network.value",
    "network.with_impact",
    "network.later_prompts",
    "network.with_rates",
    "network.with_preferences",
    "network.with_sessions",
    "network.residual",
    "network.slots",
    "network.rate_clip_per_s",
    "network.hidden",
    "network.han.features",
    "network.han.heads",
    "network.han.layers",
    "targets",
    "num_envs",
    "chunk",
    "copies",
    "probes",
    "updates",
    "batch_size",
    "capacity",
    "warm_up",
    "shards",
    "hyper.learning_rate",
    "hyper.final_learning_rate",
    "hyper.gamma",
    "hyper.polyak",
    "hyper.alpha",
    "hyper.alpha_rate",
    "hyper.target_entropy",
    "hyper.min_q_weight",
    "hyper.critic_entropy",
    "hyper.width_s",
    "hyper.max_externality",
    "hyper.reset_prob",
    "hyper.empty_prob",
    "hyper.discount_s",
    "hyper.trace_decay",
    "hyper.opportunity_cost",
    "hyper.joint",
    "hyper.weights.score",
    "hyper.weights.violation",
    "hyper.weights.drop",
    "hyper.weights.kv_memory",
    "hyper.weights.energy",
    "hyper.weights.predicted_loss",
    "hyper.weights.potential",
)
RANDOMISED = ("load", "arrivals", "prediction", "staleness", "limit", "fleet")
KEPT = ("auto", "best", "last")
STUDIES = (
    "load",
    "edge",
    "edge_arrivals",
    "arrivals",
    "stale",
    "staleness",
    "limit",
    "prediction",
    "experts",
    "unseen",
    "planner",
    "hindsight",
    "ablations",
    "refusing",
    "learners",
    "energy",
    "dial",
)
BUDGETS = ("quick", "full")
CHANGES = ("control", "coefficients", "engine", "predictions", "clock", "arrivals")
BELIEFS = ("stale", "true", "both")
FINE_TUNED_LAYERS, FINE_TUNING_EPOCHS = 2, 3
TRACE_FORMATS = (
    "azure",
    "burstgpt",
    "mooncake",
    "vidur",
    "splitwise",
    "blis",
    "litellm",
    "sglang",
    "benchmark",
    "csv",
    "arrivals",
)
