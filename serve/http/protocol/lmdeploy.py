"""LMDeploy's endpoints, POST /v1/chat/interactive and POST /v1/encode, and POST /tokenize."""

from typing import Annotated, Any

from pydantic import Field

from serve import limits
from serve.http.protocol.body import Body, Empty, Off, ShortText
from serve.http.protocol.messages import Message, plain_messages
from serve.http.protocol.sampling import Sampling

Messages = Annotated[list[Message], Field(max_length=limits.MAX_MESSAGES, fail_fast=True)]


class InteractiveRequest(Sampling):
    """POST /v1/chat/interactive, LMDeploy's endpoint that keeps the conversation on the server."""

    prompt: str | Messages
    interactive_mode: bool | None = None
    cancel: bool | None = None
    request_output_len: int | None = Field(None, ge=0, description="0 with an empty prompt ends the session.")
    image_url: Empty = None

    def turn(self) -> list[dict[str, Any]]:
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}] if self.prompt else []
        return plain_messages(self.prompt, "prompt")


class EncodeRequest(Body):
    """POST /v1/encode: token ids of one text or of several."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=limits.MAX_PROMPTS, fail_fast=True)]
    do_preprocess: Off | None = None
    add_bos: bool | None = Field(None, description="null: true, LMDeploy's default: the model's own rule.")


class TokenizeText(Body):
    """POST /tokenize, a plain prompt."""

    model: ShortText | None = None
    prompt: str
    add_special_tokens: bool | None = Field(None, description="false: no BOS before the prompt.")


class TokenizeChat(Body):
    """POST /tokenize, a conversation, as the model would see it."""

    model: ShortText | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)]
