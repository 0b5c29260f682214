"""From a request's fields to the engine's `SamplingParams`, with every limit that needs the model or the server."""

import asyncio
from typing import TypeVar

from tucka_runtime.config import ServerConfig
from tucka_runtime.errors import ContextLengthError, InvalidRequestError
from tucka_runtime.messages import EngineInfo, SamplingParams
from tucka_runtime.server.api import fields
from tucka_runtime.server.api.bodies import GenerationBody, SamplingBody
from tucka_runtime.server.api.door import Context

T = TypeVar("T", int, float)


async def sampling_params(
    body: SamplingBody,
    context: Context,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: str | None = None,
) -> SamplingParams:
    """What the body asks, then what its model's defaults say. `max_tokens`, the logprobs and the grammar are already
    checked. Raises InvalidRequestError.

    Off the event loop where there are `bad_words`: to make tokens of 1,024 takes a tenth of a second.
    """
    given = body, context, max_tokens, logprobs, prompt_logprobs, grammar
    return await asyncio.to_thread(_params, *given) if body.bad_words else _params(*given)


def _params(
    body: SamplingBody,
    context: Context,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: str | None,
) -> SamplingParams:
    service, own = context.service, context.defaults.generation
    info, vocab_size, min_tokens = service.info, context.vocab_size, min(own.min_new_tokens or 0, max_tokens)
    if body.min_tokens is not None and (min_tokens := body.min_tokens) > max_tokens:
        raise InvalidRequestError(
            "`min_tokens` is larger than `max_tokens`, or than what the context leaves.", "min_tokens"
        )
    top_p = _first(body.top_p, own.top_p, 1.0)
    greedy = top_p == 0  # the smallest set of tokens is the likeliest alone
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=0.0 if greedy else _first(body.temperature, own.temperature, 1.0),
        top_p=1.0 if greedy else top_p,
        top_k=min(max(_first(body.top_k, own.top_k, 0), 0), vocab_size),
        min_p=_first(body.min_p, own.min_p, 0.0),
        repetition_penalty=_first(body.repetition_penalty, own.repetition_penalty, 1.0),
        presence_penalty=_first(body.presence_penalty, 0.0),
        frequency_penalty=_first(body.frequency_penalty, 0.0),
        logit_bias=fields.logit_bias(body.logit_bias, vocab_size),
        allowed_token_ids=_allowed(body, {*info.eos_token_ids, *own.eos_token_id}, vocab_size, min_tokens, grammar),
        bad_words=fields.bad_words(body.bad_words, context.defaults, vocab_size),
        seed=None if body.seed is None else body.seed % 2**63,
        stop_token_ids=fields.stop_token_ids(body.stop_token_ids, vocab_size),
        end_token_ids=own.eos_token_id,
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
        stop=fields.stops(body.stop),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def _allowed(
    body: SamplingBody, model_ends: set[int], vocab_size: int, min_tokens: int, grammar: str | None
) -> tuple[int, ...]:
    """The only tokens that may be chosen. `model_ends` end an answer unless that is ignored. Raises InvalidRequestError
    where nothing could be."""
    allowed = fields.allowed_token_ids(body.allowed_token_ids, vocab_size)
    if not allowed:
        return ()
    if grammar is not None:
        raise InvalidRequestError(
            "`allowed_token_ids` cannot be combined with what the answer has to match (`response_format`, a required "
            "call).",
            "allowed_token_ids",
        )
    ends = {*(body.stop_token_ids or ()), *(() if body.ignore_eos else model_ends)}
    if min_tokens and ends.issuperset(allowed):
        raise InvalidRequestError(
            "`allowed_token_ids` has only tokens that end the answer, which `min_tokens` forbids.", "allowed_token_ids"
        )
    return allowed


def num_sequences(body: GenerationBody, num_prompts: int, config: ServerConfig) -> int:
    """`n`, checked before anything of its size is made."""
    n = 1 if body.n is None else body.n
    if body.best_of not in (None, n):
        raise InvalidRequestError("`best_of` other than `n` is not supported by this server. Leave it out.", "best_of")
    if n * num_prompts > config.max_n:
        raise InvalidRequestError(
            f"The request asks for more than {config.max_n} answers (prompts x n), this server's --max-n.", "n"
        )
    return n


def num_logprobs(value: int | None, param: str, config: ServerConfig) -> int | None:
    if value is not None and not 0 <= value <= config.max_logprobs:
        raise InvalidRequestError(f"`{param}` must lie between 0 and {config.max_logprobs}.", param)
    return value


def num_prompt_logprobs(body: GenerationBody, context: Context) -> int | None:
    """The number of alternatives wanted for each token of the prompt; -1 asks for the whole vocabulary. Raises
    InvalidRequestError."""
    asked = body.prompt_logprobs
    if asked is None:
        return None
    if body.stream:
        raise InvalidRequestError("`prompt_logprobs` are not sent in streams. Leave out `stream`.", "prompt_logprobs")
    return num_logprobs(context.vocab_size if asked < 0 else asked, "prompt_logprobs", context.service.config)


def max_tokens_for(
    asked: int | None,
    default: int | None,
    longest_prompt: int,
    info: EngineInfo,
    param: str = "max_tokens",
    prompt_param: str = "prompt",
) -> int:
    """Tokens that may be generated: what is asked, as far as the context has room for it. `default` None is: up to the
    end of the context. Raises ContextLengthError where there is no room, or more is asked than the context holds."""
    context = info.context
    if asked is not None and not 0 <= asked <= context:
        raise ContextLengthError(
            f"This model's maximum context length is {context} tokens: `{param}` must lie between 0 and that.", param
        )
    room = context - longest_prompt
    wanted = asked if asked is not None else room if default is None else default
    if room < 0 or (room == 0 and asked != 0):
        size = f"{longest_prompt} tokens" + (", which leave no room for an answer" if room == 0 else "")
        raise ContextLengthError.too_long(context, size, prompt_param)
    return min(wanted, room)


def _first(*values: T | None) -> T:
    """The first that is set; the last always is."""
    return next(value for value in values if value is not None)
