"""Schemas as pydantic makes them: `python from_pydantic.py > pydantic.json`."""

import datetime
import decimal
import enum
import ipaddress
import json
import pathlib
import typing
import uuid
from typing import Annotated, Literal, Optional

import pydantic
import typing_extensions
from pydantic import AnyUrl, BaseModel, ConfigDict, EmailStr, Field, HttpUrl, RootModel, conint, conlist, constr


class Colour(enum.Enum):
    red = "red"
    green = "green"


class Level(enum.IntEnum):
    low = 1
    high = 2


class User(BaseModel):
    """A person, as instructor's first example extracts it."""

    name: str
    age: int


class Address(BaseModel):
    street: str = Field(..., description="With the house's number", examples=["Main Street 1"])
    zip: str = Field(pattern=r"^\d{5}(-\d{4})?$")


class Defaults(BaseModel):
    name: str = "nobody"
    age: int | None = None
    tags: list[str] = Field(default_factory=list)
    nick: str = Field(default=None, deprecated=True, json_schema_extra={"x-order": 3, "example": "joe"})


class Nested(BaseModel):
    user: User
    addresses: list[Address]
    home: Address | None = None
    by_name: dict[str, Address]


class Enums(BaseModel):
    colour: Colour
    level: Level
    size: Literal["s", "m", "l"]
    one: Literal[1]
    mixed: Literal["a", 2, None, True]


class Numbers(BaseModel):
    age: int = Field(ge=0, le=150)
    ratio: float = Field(gt=0, lt=1)
    even: int = Field(multiple_of=2)
    step: float = Field(multiple_of=0.5)
    price: decimal.Decimal = Field(max_digits=6, decimal_places=2)
    small: conint(ge=-5, lt=5)


class Texts(BaseModel):
    short: str = Field(min_length=1, max_length=10)
    code: constr(pattern=r"^[A-Z]{2}-\d+$", strip_whitespace=True)
    loose: str = Field(pattern=r"\d{3}")
    raw: bytes


class Times(BaseModel):
    day: datetime.date
    moment: datetime.datetime
    clock: datetime.time
    span: datetime.timedelta


class Formats(BaseModel):
    id: uuid.UUID
    site: HttpUrl
    any_url: AnyUrl
    mail: EmailStr
    v4: ipaddress.IPv4Address
    v6: ipaddress.IPv6Address
    network: ipaddress.IPv4Network
    file: pathlib.Path
    secret: pydantic.SecretStr
    written: pydantic.Json
    pattern: typing.Pattern


class Collections(BaseModel):
    pair: tuple[int, str]
    many: tuple[float, ...]
    unique: set[str]
    frozen: frozenset[int]
    few: conlist(int, min_length=1, max_length=3)
    counts: dict[str, int]
    by_colour: dict[Colour, int]
    by_number: dict[int, str]
    by_code: dict[Annotated[str, Field(pattern="^[a-z]+$")], int]
    anything: typing.Any
    bag: dict
    rows: list


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


class Plain(BaseModel):
    pet: Cat | Dog
    value: int | str | bool | None
    maybe: list[User | None]


class Discriminated(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    others: list[Annotated[Cat | Dog, Field(discriminator="kind")]]


class Node(BaseModel):
    value: int
    children: list["Node"] = []
    parent: Optional["Node"] = None


class Left(BaseModel):
    right: Optional["Right"] = None


class Right(BaseModel):
    left: Left | None = None


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, title="A title")
    name: str


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]
    name: str


class Aliased(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    first_name: str = Field(alias="firstName")
    class_: str = Field(alias="class", title="Class")


class Inherited(User):
    email: str
    age: int = Field(30, ge=18)


class Empty(BaseModel):
    pass


class Numbers2(RootModel[list[int]]):
    pass


T = typing.TypeVar("T")


class Page(BaseModel, typing.Generic[T]):
    items: list[T]
    total: int


class Point(typing.NamedTuple):
    x: float
    y: float = 0.0


class Movie(typing_extensions.TypedDict, total=False):
    title: typing.Required[str]
    year: int


@pydantic.dataclasses.dataclass
class Row:
    point: Point
    movie: Movie


class Step(BaseModel):
    explanation: str
    output: str


class MathReasoning(BaseModel):
    """OpenAI's example of structured outputs."""

    steps: list[Step]
    final_answer: str


class Validated(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "x"}], "$comment": "none"})
    name: Annotated[str, pydantic.AfterValidator(str.strip)]
    not_it: Annotated[str, pydantic.WithJsonSchema({"type": "string", "not": {"const": "it"}})]


MODELS = [
    User, Address, Defaults, Nested, Enums, Numbers, Texts, Times, Formats, Collections, Plain, Discriminated, Node,
    Left, Strict, Open, Aliased, Inherited, Empty, Numbers2, Page[User], MathReasoning, Validated,
]  # fmt: skip
schemas = {model.__name__: model.model_json_schema() for model in MODELS}
schemas["Row"] = pydantic.TypeAdapter(Row).json_schema()
schemas["Union"] = pydantic.TypeAdapter(Cat | Dog | None).json_schema()
schemas["Serialised"] = Defaults.model_json_schema(mode="serialization")
print(json.dumps({"made": f"pydantic {pydantic.VERSION}", "schemas": schemas}, indent=1, ensure_ascii=False))
