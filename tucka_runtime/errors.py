"""Every error that crosses a door of the runtime, as one tree.

TuckaError
├── ConfigError                 a setting is wrong; the process does not start
├── ModelLoadError              the base model's folder cannot be served
├── InvalidRequestError    400  the request is wrong; `param` names the field
│   └── ContextLengthError 400  prompt and answer do not fit the context
├── ModelNotFoundError     404  no base model or adapter of that name
├── AdapterError
│   ├── InvalidAdapterError     400  the adapter's files are wrong
│   ├── BaseModelMismatchError  400  the adapter was made for another base
│   ├── AdapterConflictError    409  the name is taken by other content
│   └── AdapterCapacityError    503  every slot is in use, or no memory is left
├── StorageError           503  the state folder's disk refuses, or a copy in it is damaged
├── SourceError            503  an adapter's source cannot be read, or sends what it has not
├── NonFiniteError         500  a forward pass overflowed: no token can be chosen
├── OverloadedError        429  the queue is full or too slow; try again later
└── EngineDeadError        503  the engine process is down or restarting

`status`, `type` and `code` are what the HTTP door answers with. Messages say what happened, why and what to do, and
never repeat what the client sent.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any

NAMES_SHOWN = 8  # in an error about a name: at most 1 KiB


class TuckaError(Exception):
    """Root of the tree. `param` names the offending request field where there is one."""

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after: int | None = None
    """Seconds after which the same request may be served, where that is known better than by the status."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        return self.__class__, (self.message, self.param)


class ConfigError(TuckaError):
    """A flag, environment variable or configuration file holds a value that cannot be used."""


class ModelLoadError(TuckaError):
    """The base model's folder is missing files, has the wrong tensors, or needs something that is not supported."""


class InvalidRequestError(TuckaError):
    """The request is malformed or asks for what is not supported."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """Prompt or answer exceed the model's context. The first words are OpenAI's: clients look for them."""

    code = "context_length_exceeded"

    @classmethod
    def too_long(cls, context: int, size: str, param: str) -> "ContextLengthError":
        """For a prompt of `size`, with its unit."""
        return cls(
            f"This model's maximum context length is {context} tokens, and the prompt is too long: it has {size}. "
            "Shorten it.",
            param,
        )


class ModelNotFoundError(TuckaError):
    """The field `model` names neither the base nor a loaded adapter."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"

    @classmethod
    def among(cls, names: Iterable[str]) -> "ModelNotFoundError":
        """For a name that is none of those that there are for who asks."""
        first = list(islice(names, NAMES_SHOWN + 1))
        known = ", ".join(first[:NAMES_SHOWN]) + (" and others" if len(first) > NAMES_SHOWN else "")
        there = f"There are {known}. GET /v1/models lists them all." if first else "There is none for this key."
        return cls(f"No base model or adapter of that name is loaded. {there}", "model")


class AdapterError(TuckaError):
    """Root of what can go wrong with an adapter."""

    status = 400
    type = "invalid_request_error"


class InvalidAdapterError(AdapterError):
    """The adapter's configuration or weights are malformed, unsafe or not supported."""

    code = "invalid_adapter"


class BaseModelMismatchError(AdapterError):
    """The adapter does not fit the loaded base model: other shapes, or no module of that name."""

    code = "base_model_mismatch"


class AdapterConflictError(AdapterError):
    """The name already stands for other content."""

    status = 409
    code = "adapter_exists"


class AdapterCapacityError(AdapterError):
    """Every slot is taken by what answers requests or is kept, or the memory beside the KV cache and what a step needs.
    `missing` are the bytes that it lacks, where that is why."""

    status = 503
    type = "server_error"
    code = "adapter_capacity"

    def __init__(self, message: str, param: str | None = None, missing: int = 0):
        super().__init__(message, param)
        self.missing = missing

    def __reduce__(self) -> tuple[Any, ...]:
        return self.__class__, (self.message, self.param, self.missing)


class StorageError(TuckaError):
    """The server's own copies of adapters cannot be written, or are damaged or gone."""

    status = 503
    type = "server_error"
    code = "storage_unavailable"


class SourceError(TuckaError):
    """An adapter's source is not reached, refuses, or sends something else than it says that it has."""

    status = 503
    code = "source_unavailable"


class NonFiniteError(TuckaError):
    """The forward pass brought NaN or infinity where a token should be chosen: finite weights overflow on the way."""

    code = "non_finite_logits"

    def __init__(self, message: str, param: str | None = "model"):
        super().__init__(message, param)

    @classmethod
    def of(cls, adapter: bool) -> "NonFiniteError":
        """`adapter`: an adapter was in it, not the base alone."""
        if adapter:
            return cls(
                "The adapter's weights overflow in this model's forward pass, so no token can be chosen. Use an "
                "earlier checkpoint of it, or one that was trained with a smaller learning rate or alpha."
            )
        return cls(
            "This model's forward pass overflowed, so no token can be chosen. Serve it with --dtype float32, or "
            "bfloat16."
        )


class OverloadedError(TuckaError):
    """The waiting queue is full, or too slow; `retry_after` in seconds."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(message, param)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return self.__class__, (self.message, self.param, self.retry_after)


class EngineDeadError(TuckaError):
    """The engine process ended or has not come up."""

    status = 503
    type = "server_error"
    code = "engine_unavailable"
