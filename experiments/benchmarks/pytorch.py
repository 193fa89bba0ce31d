"""The suite ``pytorch``: the agent ``sac_td0`` of this package against the same agent in PyTorch.

Both learn in the same simulator from the same graph, with networks of one shape and the same number of gradient steps.
The PyTorch agent gets its observations from the gymnasium adapter, as any other library would. Its graph attention is
batched over environments and samples. It needs the extra ``sb3``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.benchmarks import training
from qos_jax.agent import AGENTS, AgentConfig
from qos_jax.errors import InputError
from qos_jax.gym import RouterVectorEnv
from qos_jax.worlds.build import make

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise InputError("--suite=pytorch needs torch: pip install 'qos_jax[sb3]'") from error

_PRESETS = ("paper-3", "edge-8")
_LOAD = 0.9
_CHUNKS = 4  # that are timed; each has the requests and gradient steps of a chunk of ``sac_td0``
_MASKED = -1e9

Batch = dict[str, Tensor]


def rows() -> Iterator[dict[str, Any]]:
    """Measures both on each preset; ``times_torch`` is the ratio of their steps per second."""
    config = AGENTS["sac_td0"]
    for preset in _PRESETS:
        jax_row = training.learner_row(preset, "sac_td0")
        torch_row = _torch_row(preset, config)
        jax_row["updates_per_s"] = jax_row["steps_per_s"] * config.updates / (config.num_envs * config.chunk)
        jax_row["times_torch"] = jax_row["steps_per_s"] / torch_row["steps_per_s"]
        yield jax_row
        yield torch_row


def _torch_row(preset: str, config: AgentConfig) -> dict[str, Any]:
    env, params = make(preset, load=_LOAD)
    trainer = _Trainer(RouterVectorEnv(env, params, config.num_envs, graph=True), config)
    trainer.chunk()  # warms up
    start = time.perf_counter()
    acting_s = sum(trainer.chunk() for _ in range(_CHUNKS))
    spent_s = time.perf_counter() - start
    return {
        "case": f"train sac_td0 in torch {torch.__version__} on {preset}",
        "steps_per_s": _CHUNKS * config.chunk * config.num_envs / spent_s,
        "updates_per_s": _CHUNKS * config.updates / spent_s,
        "share_of_acting": acting_s / spent_s,
        "weights": sum(parameter.numel() for parameter in trainer.network.parameters()),
    }


class _Trainer:
    """Discrete SAC by temporal differences: a policy and two critics on one encoder, and their running average."""

    def __init__(self, envs: RouterVectorEnv, config: AgentConfig) -> None:
        torch.manual_seed(0)
        self.envs, self.config, self.hyper = envs, config, config.hyper
        obs, info = envs.reset(seed=0)
        self.observed = self._tensors(obs, info["action_mask"])
        self.network, self.average = (_Network(self.observed, config) for _ in range(2))
        self.average.load_state_dict(self.network.state_dict())
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=float(config.hyper.learning_rate))
        self.replay: list[tuple[Batch, Tensor, Tensor, Batch]] = []

    def chunk(self) -> float:
        """Steps every environment ``chunk`` times, then takes the updates; returns the seconds of stepping."""
        start = time.perf_counter()
        for _ in range(self.config.chunk):
            with torch.no_grad():
                logits, _ = self.network(self.observed)
                action = torch.distributions.Categorical(logits=logits).sample()
            obs, reward, *_, info = self.envs.step(action.numpy())
            after = self._tensors(obs, info["action_mask"])
            self.replay.append((self.observed, action, torch.as_tensor(reward), after))
            self.observed = after
        acting_s = time.perf_counter() - start
        for _ in range(self.config.updates):
            self._update(*self._batch())
        return acting_s

    def _batch(self) -> tuple[Batch, Tensor, Tensor, Batch]:
        step = torch.randint(len(self.replay), (self.config.batch_size,))
        row = torch.randint(self.config.num_envs, (self.config.batch_size,))
        picked = [(self.replay[i], j) for i, j in zip(step.tolist(), row.tolist(), strict=True)]
        now, after = (
            {name: torch.stack([one[part][name][j] for one, j in picked]) for name in self.observed} for part in (0, 3)
        )
        return now, torch.stack([one[1][j] for one, j in picked]), torch.stack([one[2][j] for one, j in picked]), after

    def _update(self, now: Batch, action: Tensor, reward: Tensor, after: Batch) -> None:
        alpha, gamma = float(self.hyper.alpha), float(self.hyper.gamma)
        with torch.no_grad():
            logits, _ = self.network(after)
            _, q_after = self.average(after)
            policy = logits.softmax(-1)
            target = reward + gamma * (policy * q_after.mean(1).masked_fill(after["legal"] == 0, 0.0)).sum(-1)
        logits, q = self.network(now)
        taken = q.gather(-1, action[:, None, None].expand(-1, 2, 1))[..., 0]
        critic_loss = (taken - target[:, None]).square().mean()
        policy, log_policy = logits.softmax(-1), logits.log_softmax(-1)
        actor_loss = (policy * (alpha * log_policy - q.mean(1).detach())).sum(-1).mean()
        self.optimizer.zero_grad()
        (critic_loss + actor_loss).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
        self.optimizer.step()
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(new, 1.0 - float(self.hyper.polyak))

    def _tensors(self, obs: dict[str, np.ndarray], legal: np.ndarray) -> Batch:
        slots = self.config.network.slots  # the first slots hold the first to arrive, but for gaps
        cut = {name: obs[name][:, :, :slots] for name in ("requests", "running", "waiting")}
        uncut = {name: obs[name] for name in ("arrived", "experts")}
        return {name: torch.as_tensor(x) for name, x in (uncut | cut | {"legal": legal}).items()}


class _Network(nn.Module):
    """Graph attention and pointer heads of the same shape as in ``qos_jax.encoder.han`` and ``agent.networks``."""

    def __init__(self, like: Batch, config: AgentConfig) -> None:
        super().__init__()
        width, heads, hidden = config.network.han.features, config.network.han.heads, config.network.hidden[0]
        sizes = [like[name].shape[-1] for name in ("arrived", "experts", "requests")]
        self.layers = nn.ModuleList()
        for _ in range(config.network.han.layers):
            self.layers.append(_Layer(*sizes, width=width, heads=heads))
            sizes = [width] * 3
        names = ("actor", "critic_0", "critic_1")
        self.place = nn.ModuleDict({name: _mlp(4 * width, hidden) for name in names})
        self.drop = nn.ModuleDict({name: _mlp(3 * width, hidden) for name in names})

    def forward(self, nodes: Batch) -> tuple[Tensor, Tensor]:
        """Returns the policy's logits [B, N + 1] and both critics [B, 2, N + 1]."""
        arrived, experts, requests = nodes["arrived"], nodes["experts"], nodes["requests"]
        queues = torch.stack([nodes["running"], nodes["waiting"]], -2).bool()
        for layer in self.layers:
            arrived, experts, requests = layer(arrived, experts, requests, queues)
        fleet = torch.cat([arrived, experts.mean(1), experts.amax(1)], -1)
        around = torch.cat([experts, fleet[:, None].expand(-1, experts.shape[1], -1)], -1)
        each = [torch.cat([self.place[name](around)[..., 0], self.drop[name](fleet)], -1) for name in self.place]
        return each[0].masked_fill(nodes["legal"] == 0, _MASKED), torch.stack(each[1:], 1)


class _Layer(nn.Module):
    """One layer of graph attention.

    An expert attends to its running and waiting requests and to the arrived one, a request to its expert, and the
    arrived request to all experts.
    """

    def __init__(self, arrived: int, expert: int, request: int, *, width: int, heads: int) -> None:
        super().__init__()
        self.from_requests = _Attention(expert, request, 2, width, heads)
        self.from_experts = _Attention(arrived, expert, 1, width, heads)
        self.arrived_to_expert = nn.Linear(arrived, width)
        self.expert_to = nn.ModuleList(nn.Linear(expert, width) for _ in range(2))
        self.own = nn.ModuleList(nn.Linear(size, width) for size in (arrived, expert, request))
        self.key, self.query = nn.Linear(width, width), nn.Linear(width, 1, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, arrived: Tensor, experts: Tensor, requests: Tensor, queues: Tensor) -> tuple[Tensor, ...]:
        """Returns the new embeddings; ``queues`` [B, N, 2, S] marks the running and the waiting requests."""
        of_arrived = self.arrived_to_expert(arrived).relu()[:, None, None].expand(-1, experts.shape[1], -1, -1)
        read = torch.cat([self.from_requests(experts, requests, queues), of_arrived], -2)
        present = torch.cat([queues.any(-1), torch.ones_like(queues[..., :1, 0])], -1)
        score = self.query(self.key(read).tanh())[..., 0].masked_fill(~present, _MASKED)
        read = (score.softmax(-1)[..., None] * read).sum(-2)
        new_experts = self.norms[1]((self.own[1](experts) + read).relu())
        all_experts = torch.ones(1, experts.shape[1], dtype=torch.bool)
        read = self.from_experts(arrived[:, None], experts[:, None], all_experts)[:, 0, 0]
        new_arrived = self.norms[0]((self.own[0](arrived) + read).relu())
        running, waiting = (to(experts).relu()[:, :, None] for to in self.expert_to)
        read = torch.where(queues[..., 0, :, None], running, waiting)
        return new_arrived, new_experts, (self.own[2](requests) + read).relu()


class _Attention(nn.Module):
    """Graph attention (GAT) of T targets, each to K sources, in R relations."""

    def __init__(self, target: int, source: int, relations: int, width: int, heads: int) -> None:
        super().__init__()
        self.shape = (relations, heads)
        self.target, self.source = (
            nn.Linear(target, relations * heads),
            nn.Linear(source, relations * heads, bias=False),
        )
        self.kernel = nn.Parameter(torch.randn(relations, heads, source, width // heads) * source**-0.5)
        self.bias = nn.Parameter(torch.zeros(relations, width))

    def forward(self, targets: Tensor, sources: Tensor, mask: Tensor) -> Tensor:
        """Returns embeddings [B, T, R, D].

        Args:
          targets: [B, T, F].
          sources: [B, T, K, F'].
          mask: bool, broadcast to [B, T, R, K].
        """
        of_source = self.source(sources).unflatten(-1, self.shape).movedim(-3, -1)
        logits = nn.functional.leaky_relu(self.target(targets).unflatten(-1, self.shape)[..., None] + of_source, 0.2)
        mask = mask[..., None, :]
        weights = logits.masked_fill(~mask, _MASKED).softmax(-1) * mask
        means = torch.einsum("btrhk,btkf->btrhf", weights, sources)
        read = torch.einsum("btrhf,rhfd->btrhd", means, self.kernel).flatten(-2)
        return (read + self.bias).relu()


def _mlp(inputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 1))
