"""Constants of the simulator, for modules that do without JAX."""

BLOCK_SIZE_TOKENS = 16
TOKEN_BUDGET = 2048
OBSERVE = ("engine", "proxy")  # what routers may observe: all that an engine knows, or what a proxy before it does
MAX_QUEUE = 4096  # requests that an engine may run at once, or have waiting
MAX_HISTORY = 4096  # snapshots of stale metrics
MAX_LENGTH = 2**20  # tokens at which prompts and answers may be cut off
MAX_AGE_S = 1e6  # s, of metrics
MAX_SOJOURN_S = 1e9  # s, mean time that an expert is up or down
MAX_SESSIONS = 4096  # conversations at a time

ATTENTION_TERMS = (
    "decode",  # s, of an iteration that only decodes
    "decode_per_request",  # s/request, there
    "decode_per_kv_token",  # s per cached token of its requests, there
    "prompt",  # s, of an iteration that only computes prompts
    "mixed",  # s, of one that does both and computes prompts from their first token on
    "mixed_chunked",  # s, of one that does both, where a part of a prompt is cached already
    "mixed_per_request",  # s per decoding request of an iteration that does both
    "mixed_per_kv_token",  # s per cached token of these requests
    "per_early_prompt_token",  # s per prompt token of the iteration, up to ``EARLY_PROMPT_TOKENS`` of them
    "per_late_prompt_token",  # s per prompt token beyond
    "per_pair",  # s per pair of a prompt token and a token before it in the same prompt
    "per_prefix_token",  # s per token of these prompts that is cached already
)
EARLY_PROMPT_TOKENS = 128  # one tile of a prefill kernel
