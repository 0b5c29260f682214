"""What schemathesis is to check besides. It imports this in its own process, by SCHEMATHESIS_HOOKS."""

import json
from typing import Any

import schemathesis
from pydantic import TypeAdapter, ValidationError
from schemathesis.core import NotSet

from tucka_runtime.server.api.openapi import BODIES


@schemathesis.check
def valid_bodies_fit_their_models(ctx: Any, response: Any, case: Any) -> None:
    """Where a body is refused that is as the description says, it was not by its typed model, of which that is made:
    what is refused beyond is known to this server alone."""
    kind = BODIES.get(case.path)
    if kind is None or isinstance(case.body, NotSet) or response.status_code != 400:
        return  # a path that takes bodies can be asked for a list, too
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    try:
        TypeAdapter(kind).validate_python(json.loads(json.dumps(case.body)))
    except ValidationError as error:
        raise AssertionError(f"A body as it is described is refused: {error}") from None
