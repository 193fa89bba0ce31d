"""The flags of all programs, by group. Nothing here imports JAX, so that ``--help`` answers at once."""

from __future__ import annotations

from absl.flags import FlagValues

from qos_jax.programs import choices
from qos_jax.programs.app import FlagGroup

_listed = ", ".join


def define_world(values: FlagValues) -> None:
    """Defines the flags that describe a world; ``world_flags.world_config`` reads them."""
    group = FlagGroup(values, "World")
    group.string("preset", "paper-3", f"World by name: {_listed(choices.PRESETS)}.")
    group.string("fleet", None, "Fleet file instead: experts, limits of the users, quality of the answers.")
    group.texts("experts", None, "Other experts than the preset's: LLM@GPU,LLM@GPU,...")
    group.choice("engine", None, choices.ENGINES, f"Engine of all experts: {_listed(choices.ENGINES)}, as vLLM runs by "
                 "default or with synchronous scheduling and no prefix cache; the preset's by default.")  # fmt: skip
    group.string("arrivals", None, "Law of arrivals: poisson, gamma:CV, mmpp:BURST:SECONDS, sinusoidal:AMPLITUDE:"
                 "PERIOD_S, or servegen:FILE:HOUR, the clients in an .npz; the preset's by default.")  # fmt: skip
    group.string("trace", None, "File of recorded arrivals instead, in a format of --trace_format; may be packed by "
                 "gzip.")  # fmt: skip
    group.choice("trace_format", None, choices.TRACE_FORMATS, f"Format of the trace: {_listed(choices.TRACE_FORMATS)}; "
                 "by default recognised from its first line.")  # fmt: skip
    group.boolean("trace_sort", False, "Sort the rows of the trace by time, rather than refuse those out of order.")
    group.boolean("trace_lengths", False, "Take the lengths of prompts and answers from the trace, too.")
    group.number("trace_spread", None, "The trace's times are rounded to steps of so many seconds, Mooncake's to 3: "
                 "spread the requests of a step over it.")  # fmt: skip
    group.choice("trace_part", None, ("all", "first", "second"), "Half of the trace to use, by time: first for "
                 "training, all of it otherwise by default.")  # fmt: skip
    group.string("quality_table", None, "Table of real prompts and answers: .npz, or mix-instruct JSON lines.")
    group.string("score_column", None, "Scores: quality_bertscore_minilm of .npz, bertscore of JSON lines by default.")
    group.number("test_fraction", 0.5, "Share of the table's prompts that are kept for testing.")
    group.choice("table_part", None, ("all", "train", "test"), "Part of the table to draw from: train for training, "
                 "test otherwise by default.")  # fmt: skip
    group.string("prompts", None, "JSON lines with the texts of an .npz table, for --predictor.")
    group.string("predictor", None, "Folder of a trained predictor, whose predictions the routers observe.")
    group.string("prediction", None, "What routers know of scores and lengths: realistic, perfect, none or "
                 "r2:SCORE:LENGTH; the preset's by default.")  # fmt: skip
    group.texts("latency_limit", None, "Latency limit per token, as 30ms, 0.03s or 0.03, which is in seconds; or those "
                "of several equally common classes of users; none lifts the preset's.")  # fmt: skip
    group.texts("ttft_limit", None, "Limit on the time to the first token, as 500ms, for all or each class of users.")
    group.texts("tpot_limit", None, "Limit on the time per token after the first, likewise.")
    group.texts("e2e_limit", None, "Limit on the time to the last token, likewise. An answer must meet all limits.")
    group.number("staleness", None, "Routers observe metrics at least this many seconds late.")
    group.choice("observe", None, choices.OBSERVE, "What routers observe: all that an engine knows, or what a proxy in "
                 "front of it does, as qos-jax gateway; engine by default.")  # fmt: skip
    group.number("scrape", None, "Seconds between two readings of the engines' metrics, for --observe=proxy.")
    group.string("sessions", None, "Requests are turns of conversations, OPEN:TURNS:TOKENS: how many are open at "
                 "a time, their mean number of turns, the tokens beyond which one begins anew, as in 128:4:4096; none "
                 "lifts the preset's.")  # fmt: skip
    group.string("failures", None, "Experts fail and return, UP:DOWN: the mean seconds that each is up and down in "
                 "turn, as in 600:30. A failed expert loses its requests. none lifts the preset's.")  # fmt: skip
    group.boolean("allow_drop", None, "Routers may drop a request.")
    group.texts("plugins", None, "Modules to import first, which register routers, arrivals, networks or targets, "
                "also from the current folder.")  # fmt: skip


def define_train(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax train``."""
    define_world(values)
    group = FlagGroup(values, "Agent")
    group.string("agent", "mvr", f"Agent to train, with the recipe of the world: {_listed(choices.AGENTS)}, or "
                 "package.module:factory, which returns an AgentConfig.")  # fmt: skip
    group.texts("set", [], "Other values for fields of the agent, FIELD=VALUE with commas between them and x within "
                "tuples, as in learning_rate=3e-4,han.layers=3,hidden=64x64. Fields: "
                f"{_listed(choices.AGENT_FIELDS)}.")  # fmt: skip
    group.integer("num_envs", None, "Environments side by side of each seed; the agent's by default.")
    group.number("learning_rate", None, "The agent's by default.")
    group = FlagGroup(values, "Training")
    group.integer("steps", None, "Requests routed in training, of each seed; the recipe's by default.", 1)
    group.texts("load", None, "Load to train at, or the ends of a range to draw from; the recipe's by default.")
    group.texts("randomise", None, "What differs between environments: all, none, or some of "
                f"{_listed(choices.RANDOMISED)}; the recipe's by default. And preferences, which all leaves out: the "
                "weights of the reward, which the network then reads.")  # fmt: skip
    group.repeated("vary", "FIELD=VALUE,VALUE: values for a number of the algorithm, or for the load. Every "
                   "combination trains with every seed, side by side.")  # fmt: skip
    group.integer("seed", 0, "The seed, or the first of several; below 1000, as evaluation uses the others.", 0)
    group.integer("seeds", 1, "How many seeds to train side by side.", 1)
    group = FlagGroup(values, "Evaluation in training")
    group.integer("evaluate_every", None, "Steps between evaluations; a tenth of all by default.", 1)
    group.integer("evaluation_envs", 32, "Environments of an evaluation.", 2)
    group.integer("evaluation_steps", 800, "Requests of each of them.", 1)
    group.choice("keep", "auto", choices.KEPT, "Weights of the router: the last ones, or those of each seed's best "
                 "evaluation where they were better; auto means the best where evaluations judge what training strives "
                 "for, which is QoS without costs in worlds that differ in load and arrivals only.")  # fmt: skip
    group = FlagGroup(values, "Run")
    group.string("out", "runs/train", "Folder of the run.")
    group.choice("resume", "no", ("no", "yes", "auto"), "Go on with the run in that folder; --resume alone means yes, "
                 "auto begins a new run where there is none.")  # fmt: skip
    group.number("checkpoint_minutes", 2.0, "Minutes between checkpoints.", 0.0)
    group.boolean(
        "save_replay", True, "Checkpoints hold the replay buffer; without it a run does not resume bit for bit."
    )
    group = FlagGroup(values, "Devices")
    group.boolean("deterministic", False, "Repeats bit for bit on a GPU, too, at some cost; a CPU always does.")
    group.integer("devices", None, "Devices that share seeds and shards (--set=shards=N); one by default.", 1)
    group.boolean("distributed", False, "Several processes run this command, and all their devices share the work.")
    group.string("coordinator_address", None, "HOST:PORT of the first process; found under Slurm and MPI by itself.")
    group.integer("num_processes", None, "Number of processes; found likewise.", 1)
    group.integer("process_id", None, "Number of this process, from 0; found likewise.", 0)


def define_evaluate(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax evaluate``."""
    define_world(values)
    group = FlagGroup(values, "Routers")
    group.texts("routers", ["all"], f"Routers to compare: all, main, names ({_listed(choices.ROUTERS)}, expert_0, "
                "...), folders of training runs, FOLDER@SEED, FOLDER:energy=2:drop=0.5 for other preferences, "
                "FOLDER:margin=0.05 for another level of place against drop, or package.module:factory.")  # fmt: skip
    group = FlagGroup(values, "Requests")
    group.texts("load", None, "Arrival rates as fractions of the fleet's saturation rate; 0.3 to 1.3 by default.")
    group.texts("rate", None, "Arrival rates in requests/s, instead.")
    _define_requests(group, requests=3000, seeds=5)
    group = FlagGroup(values, "Output")
    group.string("out", "runs/evaluate", "Folder for results.json, tables, report.html and pictures.")
    group.boolean("overwrite", False, "The folder may hold another evaluation, which is lost.")


def define_robustness(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax robustness``."""
    define_world(values)
    group = FlagGroup(values, "Routers")
    group.texts("routers", ["main"], "Routers to judge, as for qos-jax evaluate. Learned ones should be trained in the "
                "unchanged world.")  # fmt: skip
    group = FlagGroup(values, "Changes")
    group.texts("changes", list(choices.CHANGES), f"Kinds of changes: {_listed(choices.CHANGES)}.")
    group.choice("belief", "stale", choices.BELIEFS, "Routers observe the profile of the unchanged world (stale), the "
                 "changed one (true), or once each (both).")  # fmt: skip
    group.number("coefficient_by", 0.1, "Share by which coefficients and KV blocks are changed.", 0.001, 0.9)
    group.number("rate_by", 0.05, "Share by which the arrival rate is changed.", 0.001, 0.9)
    group.number("late_by", 0.1, "Seconds by which metrics are later.", 0.001)
    group = FlagGroup(values, "Requests")
    group.texts("load", ["0.6", "0.9", "1.1"], "Arrival rates as fractions of the unchanged fleet's saturation rate.")
    _define_requests(group, requests=1000, seeds=16)
    group = FlagGroup(values, "Output")
    group.string("out", "runs/robustness", "Folder for robustness.json and robustness.md.")


def define_capacity(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax capacity``."""
    define_world(values)
    group = FlagGroup(values, "Capacity")
    group.texts("routers", ["main"], "Routers to compare, as for qos-jax evaluate.")
    group.number("share", 0.95, "Share of the requests that is to meet its limits.", 0.01, 0.9999)
    group.repeated("what_if", "Flags of the world to change, as in '--ttft_limit=300ms'; adds a table.")
    group.number("price_per_kwh", 0.0, "Of electricity; adds the price of 1,000 good answers, in that currency.", 0.0)
    group.number("price_per_hour", 0.0, "Of the whole fleet, for rent or depreciation; likewise.", 0.0)
    group = FlagGroup(values, "Requests")
    _define_requests(group, requests=2000, seeds=8)
    group = FlagGroup(values, "Output")
    group.string("out", "runs/capacity", "Folder for capacity.json and capacity.md.")


def define_arena(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax arena``."""
    group = FlagGroup(values, "Arena")
    group.texts("worlds", list(choices.ARENA_WORLDS), f"Worlds: some of {_listed(tuple(choices.ARENA_WORLDS))}.")
    group.repeated("world", "NAME: FLAGS, another world, as in 'mine: --fleet=fleet.toml --arrivals=gamma:3'.")
    group.texts("routers", ["arena"], "Routers to judge, as for qos-jax evaluate; arena are the baselines.")
    group.string("trained", None, "Folder with a training run for each world under its name, or a folder of several; "
                 "each of them is a router in that world.")  # fmt: skip
    group.texts("scrape", ["0.1", "1"], "Seconds between two readings of the engines' metrics by the proxy whose view "
                "all routers have; a table for each.")  # fmt: skip
    group.boolean("refusing", True, "Judge each router also with impact_greedy's admission, and without drops.")
    group.texts("plugins", None, "Modules to import first, which register routers, also from the current folder.")
    group = FlagGroup(values, "Requests")
    group.texts("load", ["0.6", "0.9", "1.1"], "Arrival rates as fractions of the fleet's saturation rate.")
    _define_requests(group, requests=1500, seeds=8)
    group = FlagGroup(values, "Output")
    group.string("out", "runs/arena", "Folder for arena.json, arena.csv and arena.md.")


def define_replay_page(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax replay-page``."""
    define_world(values)
    group = FlagGroup(values, "Episode")
    group.texts("routers", ["shortest_queue", "impact_greedy"], "One to three routers, as for qos-jax evaluate.")
    group.number("load", 0.9, "Arrival rate as a fraction of the fleet's saturation rate.", 0.01, 100.0)
    group.integer("requests", 400, "Requests of the episode.", 2, 20_000)
    group.integer("seed", 1000, "Of the requests; training uses seeds below 1000.", 0)
    group = FlagGroup(values, "Output")
    group.string("out", "runs/episode.html", "File of the page.")


def _define_requests(group: FlagGroup, *, requests: int, seeds: int) -> None:
    group.integer("requests", requests, "Requests of each load and seed.", 10)
    group.number("warmup", 0.1, "Leading share of them that the metrics do not count.", 0.0, 0.9)
    group.integer("seeds", seeds, "Number of seeds.", 1)
    group.integer("first_seed", 1000, "The first of them; training uses seeds below 1000.", 0)


def define_sweep(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax sweep``."""
    group = FlagGroup(values, "Sweep")
    group.repeated("grid", "FLAG=VALUE,VALUE: values for a flag of qos-jax train; may be repeated.")
    group.string("each", "--steps=200000", "More flags of qos-jax train, the same for all.")
    group.boolean("list", False, "Only print the commands.")
    group.integer("only", None, "Run only this combination of the grid, counted from 0.", 0)
    group.string("out", "runs/sweep", "Folder of the sweep.")


def define_predictor(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax predictor``."""
    group = FlagGroup(values, "Data")
    group.string("data", None, "Table of prompts and answers: .npz, or mix-instruct JSON lines.")
    group.string("prompts", None, "JSON lines with the texts of an .npz table.")
    group.string("score_column", None, "Scores: quality_bertscore_minilm of .npz, bertscore of JSON lines by default.")
    group.number("test_fraction", 0.5, "Share of the prompts that are kept for testing.")
    group = FlagGroup(values, "Predictor")
    group.string("encoder", None, "Folder of a BERT-family encoder; without it, the table's embeddings are used.")
    group.choice("heads", "buckets", ("buckets", "regression"), "What the heads predict.")
    group.texts("hidden", ["64"], "Widths of the heads' hidden layers; empty for linear heads.")
    group.integer("buckets", 5, "Buckets of each quantity.", 2)
    group = FlagGroup(values, "Training")
    group.choice("mode", "frozen", ("frozen", "fine_tuned"), "Train the heads only, or the encoder, too.")
    group.integer("layers", choices.FINE_TUNED_LAYERS, "Last layers of the encoder that are fine-tuned.", 1)
    group.integer("epochs", choices.FINE_TUNING_EPOCHS, "Passes over the prompts in fine-tuning.", 1)
    group.integer("folds", 5, "Folds of the cross-validation, 0 for none.", 0)
    group.integer("seed", 0, "Of folds, weights and batches.", 0)
    group = FlagGroup(values, "Output")
    group.string("out", "runs/predictor", "Folder for the predictor, metrics, predictions and picture.")


def _define_link(group: FlagGroup) -> None:
    group.number("link_gb_per_s", None, "Rate of the link between two GPUs that share each layer [10^9 bytes/s]; adds "
                 "two all-reduces a layer, of 2 bytes x tokens x hidden_size. Left out: one GPU.", 0.0)  # fmt: skip
    group.number("link_us", 0.0, "Latency of an exchange over the link, whatever its size [us].", 0.0)
    group.integer("hidden_size", None, "Hidden size of the model, for what is exchanged.", 1)
    group.integer("vocab_size", None, "Vocabulary that the two GPUs share, too: adds the all-reduce of the embedding "
                  "and the exchange of the logits. Left out: neither.", 2)  # fmt: skip


def define_fit_profile(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax fit-profile``."""
    group = FlagGroup(values, "Kernel tables")
    group.string("dense", None, "csv of the dense kernels by tokens.", required=True)
    group.string("attention", None, "csv of the attention kernel by batch.", required=True)
    group.string("per_sequence", None, "csv of the head's kernels by requests; left out: no head.")
    group.integer("num_layers", 32, "Layers of the model.", 1)
    group.integer("max_kv_tokens", None, "Tokens that the model's KV memory holds; left out: fit every batch.", 1)
    _define_link(group)
    group = FlagGroup(values, "Host")
    group.number("host_us", 0.0, "Time of the host in an iteration that no kernel hides [us].", 0.0)
    group.number("host_per_sequence_us", 0.0, "Time of the host for each request in an iteration [us].", 0.0)
    group = FlagGroup(values, "Output")
    group.string("name", None, "Name of the profile; left out: that of the file.")
    group.string("llm", None, "Name of the LLM, for the record.")
    group.string("gpu", None, "Name of the GPU, for the record.")
    group.string("out", None, "File to write.", required=True)


def define_fleet(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax fleet``."""
    group = FlagGroup(values, "Fleet")
    group.choice("action", None, ("show", "catalogue"), "What to do; the first word may stand for it, as in qos-jax "
                 "fleet show FILE. catalogue lists the devices and LLMs that a file may name.")  # fmt: skip
    group.string("file", None, "Fleet file; the second word may stand for it.")
    group.string("out", None, "JSON file for what is shown, too.")


def define_fidelity(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax fidelity``."""
    group = FlagGroup(values, "Measured run")
    group.string("run", None, "Folder of the run: meta.json, requests.jsonl and timeseries.csv.", required=True)
    group.string("profiles", None, "Kernel tables of the same model on the same GPU: what comes before _dense.csv, "
                 "_attention.csv and _per_sequence.csv.", required=True)  # fmt: skip
    group.integer("num_layers", 32, "Layers of the model.", 1)
    _define_link(group)
    group.integer("kv_blocks", None, "Usable KV blocks, for a run that did not record them.", 1)
    group.choice("engine", None, choices.ENGINES, "Engine of the run; by default as recorded, else vllm-sync.")
    group.choice("shared_prefixes", "none", ("none", "lru", "endless"), "Prefixes that requests share by "
                 "prefix_blocks.jsonl: none is found, those that a cache of the KV blocks keeps, or all.")  # fmt: skip
    group.choice("form", "tables", ("tables", "coefficients"), "Time of an iteration: tables, or five coefficients.")
    group.number("host_us", 0.0, "Time of the host in an iteration that no kernel hides [us].", 0.0)
    group.number("host_per_sequence_us", 0.0, "Time of the host for each request in an iteration [us].", 0.0)
    group.string("out", "runs/fidelity", "Folder for fidelity.json, pictures and page.")


def define_gateway(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax gateway``."""
    group = FlagGroup(values, "What to do")
    group.boolean("demo", False, "Serve fake engines to clients of its own, with a page that shows them.")
    group.string("report", None, "Only report on a folder that --out named in a run with --shadow.")
    group.string("export", None, "Only write the router for this fleet to a file, FILE.npz, that --router takes.")
    group = FlagGroup(values, "Engines")
    group.string("fleet", None, "Fleet file, in which every expert has a url.")
    group.number("scrape_s", 0.5, "Seconds between two readings of an engine's metrics.", 0.01, 60.0)
    group = FlagGroup(values, "Routing")
    group.string("router", "impact_greedy", "Router: a name, the folder of a training run, FOLDER@SEED, "
                 "FOLDER:energy=2 for other preferences, FOLDER:margin=0.05 for another level of place against "
                 "drop, a file that --export wrote, or package.module:factory.")  # fmt: skip
    group.string("shadow", None, "Another router that decides, too, and is only recorded.")
    group.choice("on_drop", "reject", ("reject", "best_effort"), "Requests that the router drops are answered 429, or "
                 "served as well as can be.")  # fmt: skip
    group.choice("sessions", "stay", ("stay", "router"), "Requests of one x-session-id stay on one engine, or go where "
                 "the router decides, which sees how much of them that engine has cached.")  # fmt: skip
    group.string("predictor", None, "Folder of a trained predictor of scores and lengths; the means so far by default.")
    group.texts("plugins", None, "Modules to import first, which register routers, also from the current folder.")
    group = FlagGroup(values, "Clients")
    group.string("host", "127.0.0.1", "Address to listen on.")
    group.integer("port", 8080, "Port to listen on.", 0, 65535)
    group.string("api_keys_file", None, "File of the keys that clients must have, one a line; by default those in "
                 "QOS_JAX_GATEWAY_KEYS, with commas between them, and none if there are none.")  # fmt: skip
    group.integer("max_body_kb", 1024, "Longest request, in KiB.", 1, 2**20)
    group.number("first_token_s", 60.0, "Seconds that an engine may take to its first token.", 0.1)
    group.number("token_s", 30.0, "Seconds that it may take to each further one.", 0.1)
    group.number("drain_s", None, "Seconds that requests may take to end after SIGTERM; as long as they need by "
                 "default.", 1.0)  # fmt: skip
    group = FlagGroup(values, "Output")
    group.string("out", None, "Folder for requests.jsonl, one line for each request; none by default.")
    group.boolean("log_texts", False, "requests.jsonl holds the texts of prompts and answers, too.")


def define_observe(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax observe``."""
    group = FlagGroup(values, "Input")
    group.string("log", None, "Folder that --out named in a run of qos-jax gateway.", required=True)
    group.string("fleet", None, "Fleet file of that run.", required=True)
    group = FlagGroup(values, "Output")
    group.string("out", None, "Folder for fleet.toml, the profiles, the trace and observed.json.", required=True)


def define_reproduce(values: FlagValues) -> None:
    """Defines the flags of ``qos-jax reproduce``."""
    group = FlagGroup(values, "Studies")
    group.texts("figure", ["all"], f"Studies to make: all, or some of {_listed(choices.STUDIES)}.")
    group.choice("budget", "quick", choices.BUDGETS, "How much is spent on each.")
    group.texts("presets", ["all"], "Only the worlds of these presets, so that several machines can share a study.")
    group.integer("jobs", 1, "Training runs at a time; each needs its own memory.", 1, 64)
    group.string("out", "runs/reproduce", "Folder for runs, cells, tables, pictures and page.")
