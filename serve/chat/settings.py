"""`ChatSettings`: how the answers of a conversation are drawn. Imports nothing, so that flags read their defaults here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatSettings:
    """temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off; max_tokens None: what the context leaves."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
