"""What the bodies are made of: the strict model that all of them are, and the types of values that several have."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from tucka_runtime.names import DESCRIBED_NAME, MAX_TARGETS, MAX_WEIGHT, VERSION_DIGITS

MAX_PAGE = 1000  # cards of a list
MAX_ADAPTERS = 8  # of a combination
MAX_ADAPTER_WEIGHT = 100.0
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_CHOICES = 1024
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_CHARS = 256
MAX_CACHE_SALT_CHARS = 256
MAX_EXPERTS = 4096  # weights of a pinned route


class Body(BaseModel):
    """`ignored` are the declared fields that change nothing about an answer, whatever value they are allowed; `nested`
    those that hold other bodies. `sentences` says of fields by name what they may be, where one door differs. A field
    that a subclass declares again is acted upon. `named_by` is the field that names a body which is left out as a
    whole; None for those that are acted upon."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())

    ignored: ClassVar[frozenset[str]] = frozenset()
    nested: ClassVar[frozenset[str]] = frozenset()
    sentences: ClassVar[Mapping[str, str]] = {}
    named_by: ClassVar[str | None] = None

    def __init_subclass__(cls, without_effect: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, without_effect: bool = False, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        bases = [base for base in cls.__bases__ if issubclass(base, Body)]
        inherited = frozenset[str]().union(*(base.ignored for base in bases))
        known = {name for base in bases for name in base.model_fields}
        own = cls.__annotations__.keys()
        cls.ignored = inherited | (cls.model_fields.keys() - known) if without_effect else inherited - own
        cls.nested = frozenset(name for name, field in cls.model_fields.items() if _holds_bodies(field.annotation))


def _holds_bodies(annotation: Any) -> bool:
    if isinstance(annotation, type) and not get_args(annotation):
        return issubclass(annotation, Body)
    return any(_holds_bodies(part) for part in get_args(annotation))


def _at_most(size: int) -> Callable[[Any], Any]:
    """Pydantic checks every item of an object before it counts them, and makes an error of each."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > size:
            raise PydanticCustomError("too_long", "It has more entries than this server takes")
        return value

    return check


class _Whole:
    """JSON has one kind of numbers, of which 1.0 is the integer 1: clients of languages that have floats alone write it
    so. Tried first is what is an integer to Python too, or a list of such, so that the usual case costs no more."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        strict = handler(source)
        return core_schema.union_schema([strict, self._or_integral(strict)], mode="left_to_right")

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema["choices"][0])

    def _or_integral(self, strict: Any) -> core_schema.CoreSchema:
        if strict["type"] == "list":
            items = strict["items_schema"]
            items = core_schema.union_schema([items, self._or_integral(items)], mode="left_to_right")
            return {**strict, "items_schema": items}
        return core_schema.chain_schema([core_schema.is_instance_schema(float), {**strict, "strict": False}])


WHOLE = _Whole()
"""Last in every annotation of an integer, or of a list of them, that a client sends."""


class _Boolean:
    """To Python 0 and 0.0 are False, and of the literal too; to JSON they are not."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.chain_schema([core_schema.bool_schema(strict=True), handler(source)])

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema["steps"][1])


BOOLEAN = _Boolean()
"""In an annotation of one of the two that a client sends."""

NonEmpty = Annotated[str, Field(min_length=1)]
Integer = Annotated[int, WHOLE]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True), WHOLE]
Texts = Annotated[list[NonEmpty], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
StopTokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True), WHOLE]
AllowedTokenIds = Annotated[
    list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_LOGIT_BIAS, fail_fast=True), WHOLE
]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
BadWords = Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT_CHARS)]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIAS),
    BeforeValidator(_at_most(MAX_LOGIT_BIAS)),
]
Targets = Annotated[
    dict[str, Annotated[int, Field(ge=1, le=MAX_WEIGHT), WHOLE]],
    Field(min_length=1, max_length=MAX_TARGETS),
    BeforeValidator(_at_most(MAX_TARGETS)),
]
AdapterName = Annotated[str, Field(json_schema_extra={"pattern": DESCRIBED_NAME})]
"""Of one that is to be made. `tucka_runtime.names` checks it, and says what is wrong."""
Digits = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{VERSION_DIGITS},64}}$")]
"""Of a version's digest, as many as name it."""
EmptyList = Annotated[list[Any], Field(max_length=0)]
EmptyObject = Annotated[dict[str, Any], Field(max_length=0)]
Off = Annotated[Literal[False], BOOLEAN] | None
On = Annotated[Literal[True], BOOLEAN] | None
Nothing = EmptyList | EmptyObject | Literal[""] | Off
"""What a field holds that a client spells out without asking for anything."""
