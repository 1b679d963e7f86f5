"""`Body`, the base of all request models, and the types of fields that they share.

Unknown fields are refused by name, null means "the default". Fields of OpenAI's, vLLM's and LMDeploy's API that we do not do
are declared with the values that ask for nothing: a client that spells its defaults out is served, one that means them is
refused. Checking ends at the first wrong item of a list, and an object with too many fields is not looked into, so that no
request of a megabyte costs more than its parsing.
"""

from collections.abc import Sized
from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from serve import limits

Ignored = "Accepted for compatibility; has no effect here."
NothingAsked = "Not supported: refused unless null or empty."


def _only(value: bool) -> AfterValidator:
    def check(given: bool) -> bool:
        if given is not value:
            raise ValueError(f"only {str(value).lower()} is supported")
        return given

    return AfterValidator(check)


def _is_empty(given: Any) -> Any:
    if given is not None and (not isinstance(given, Sized) or len(given)):
        raise PydanticCustomError("none_required", "is not supported")
    return given


def at_most(count: int) -> BeforeValidator:
    """Refuses a larger object before any of its items is looked at."""

    def check(given: Any) -> Any:
        if isinstance(given, Sized) and len(given) > count:
            raise PydanticCustomError(
                "too_long",
                "has {given} items, at most {count} are taken",
                {"given": len(given), "count": count},
            )
        return given

    return BeforeValidator(check)


# Not Literal[True] and Literal[False]: to those 1 and 0 are equal.
On = Annotated[bool, _only(True), WithJsonSchema({"type": "boolean", "const": True})]
Off = Annotated[bool, _only(False), WithJsonSchema({"type": "boolean", "const": False})]
Zero = Annotated[int, Field(ge=0, le=0)]
Unsupported: TypeAlias = Annotated[None, Field(description="Not supported: refused unless null.")]
Empty: TypeAlias = Annotated[
    list[Any] | dict[str, Any] | str | None,
    BeforeValidator(_is_empty),
    Field(description=NothingAsked),
    WithJsonSchema(
        {"type": ["array", "object", "string", "null"], "maxItems": 0, "maxProperties": 0, "maxLength": 0}
    ),
]
ShortText = Annotated[str, Field(max_length=limits.MAX_NAME_CHARS)]
IgnoredText: TypeAlias = Annotated[ShortText | None, Field(description=Ignored)]
Metadata: TypeAlias = Annotated[
    dict[str, Annotated[str, Field(max_length=limits.MAX_METADATA_CHARS)]] | None,
    at_most(limits.MAX_METADATA),
    Field(description=Ignored),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "additionalProperties": {"type": "string", "maxLength": limits.MAX_METADATA_CHARS},
                    "maxProperties": limits.MAX_METADATA,
                },
                {"type": "null"},
            ]
        }
    ),
]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _count(cls, given: Any) -> Any:
        """An object with more fields than any of ours is refused as one finding, not as thousands."""
        if isinstance(given, dict) and len(given) > limits.MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields",
                "has {given} fields, at most {most} are taken",
                {"given": len(given), "most": limits.MAX_FIELDS},
            )
        return given
