"""Every limit of the server, in one place. Constants shape the API and stand in its OpenAPI description; `Limits` is configuration.

They are applied before a prompt is tokenized. Nothing else in `serve` holds a number that bounds a request.
"""

from dataclasses import dataclass, fields

from serve.prompts.encoder import PROMPT_S

MAX_N = 8  # answers to one prompt
MAX_PROMPTS = 16  # prompts in one completion request
MAX_MESSAGES = 1024  # messages of a conversation
MAX_PARTS = 1024  # parts of one message
MAX_FIELDS = 128  # fields of one object
MAX_PROMPT_IDS = 1 << 20  # token ids of one prompt; the model's context is smaller
MAX_METADATA, MAX_METADATA_CHARS = 16, 512  # pairs and characters of a value, OpenAI's limits
MAX_TOOLS = 128  # tools that a request names, calls in one message
MAX_SCORES = 1 << 18  # log-probabilities of prompts in one request, alternatives included
MAX_SCHEMA_CHARS = 1 << 16  # of a JSON schema
MAX_STOP_TOKEN_IDS = 64
MAX_STOP = 4  # stop strings
MAX_STOP_CHARS = 64
MAX_LOGPROBS = 20  # alternatives reported for a token
MAX_LOGIT_BIAS = 1024  # biased tokens
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0  # presence and frequency, both signs
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 10.0
MAX_TOP_K = 1_000_000
MAX_NAME_CHARS = 256  # model names, user names
# 64-bit integers, less the last digits that the bounds of a JSON schema, which are doubles, cannot tell apart.
SEED_MAX = 9_223_372_036_854_774_000
SEED_MIN = -SEED_MAX
SESSION_MIN, SESSION_MAX = -1, 2**53 - 1


@dataclass(frozen=True)
class Limits:
    """What the server bears. Sizes in bytes, times in seconds, the rest counts."""

    body_bytes: int = 1 << 20
    header_bytes: int = 16 << 10
    connections: int = 4096
    header_s: float = 10.0  # from the first byte of a request (or the connection) to the end of its headers
    body_s: float = 30.0  # to the end of its body
    keep_alive_s: float = 15.0
    prompt_s: float = PROMPT_S  # to render the chat template and tokenize
    chars_per_token: int = 64  # of the context: a text with more characters is not even tokenized
    request_s: float = 600.0  # from submission to the last token
    delivery_s: float = 60.0  # beyond request_s, for a client that reads slowly
    stall_s: float = 20.0  # in which a client that is behind must read 1 KiB a second
    unread: int = 1 << 19  # tokens, alternatives included, that wait for one client, beyond the newest event
    unread_in_all: int = 1 << 21  # and for all clients
    health_s: float = 10.0  # for the one-token request behind /health
    pending: int = 512  # sequences running or waiting
    pending_per_client: int | None = (
        None  # of one key or address; None: half of `pending` where several may ask
    )
    sessions: int = 1024  # conversations kept for /v1/chat/interactive
    sessions_per_client: int = 256
    forgotten_sessions: int = (
        4096  # of one client: ids of conversations that were dropped, so that it is told
    )
    session_idle_s: float = 3600.0

    def prompt_chars(self, context_length: int) -> int:
        """Characters of the longest text that is tokenized for a context of so many tokens."""
        return max(4096, self.chars_per_token * context_length)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"The limit {field.name} is {value}: expected a number above 0.")
