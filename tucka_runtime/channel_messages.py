"""What goes through the channel between the API's process and the engine's, and through that between the engine's
process and the one that reads adapters for it (channel.py).

Messages are ordered, which is what leases rely on: a request that is sent before an unload is taken on before it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tucka_runtime.config import EngineConfig
from tucka_runtime.errors import TuckaError
from tucka_runtime.messages import (
    AdapterInfo,
    AdapterKey,
    BaseLayout,
    EngineInfo,
    EngineLoad,
    Request,
    Route,
    SequenceOutput,
    StepStats,
)


@dataclass(frozen=True, slots=True)
class Start:
    """The first message to a new engine process."""

    config: EngineConfig
    log_format: str


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends what is left of a request, or the sequence `index` of it."""

    request_id: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Is answered by `AdapterLoaded` or `AdapterRefused` with the same `call`. `blob` is what the folder's content must
    be (files.blob_name). A `resident` one gets a slot, from the host cache if that has it; another goes there."""

    call: int
    key: AdapterKey
    folder: Path
    pinned: Route | None
    blob: str | None
    resident: bool = True


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """An adapter of a combination: what it is loaded from, as in `LoadAdapter`, which `member` is meant where it is a
    bank, and the `weight` that its change is multiplied with."""

    folder: Path
    pinned: Route | None
    blob: str | None
    member: int | None
    weight: float


@dataclass(frozen=True, slots=True)
class CombineAdapters:
    """The same of several adapters as one, whose change is the weighted sum of theirs."""

    call: int
    key: AdapterKey
    parts: tuple[AdapterPart, ...]
    resident: bool = True


@dataclass(frozen=True, slots=True)
class EvictAdapter:
    """From its slot into the host cache: nothing leases it."""

    key: AdapterKey


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """From its slot and from the host cache."""

    key: AdapterKey


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends the process."""


ToEngine = Submit | Abort | LoadAdapter | CombineAdapters | EvictAdapter | UnloadAdapter | Stop


@dataclass(frozen=True, slots=True)
class Started:
    """The model is loaded: requests may come. `longest_step`: seconds that a step took which was as large as any."""

    info: EngineInfo
    longest_step: float


@dataclass(frozen=True, slots=True)
class NotStarted:
    """The model cannot be served; the process ends."""

    error: TuckaError


@dataclass(frozen=True, slots=True)
class StepDone:
    outputs: list[SequenceOutput]
    stats: StepStats
    load: EngineLoad


@dataclass(frozen=True, slots=True)
class Idle:
    """The engine has no work. Comes when it has run out of it, and once a second from then on: a sign of life. `load`
    should be nothing, but it is the engine that says so."""

    load: EngineLoad


@dataclass(frozen=True, slots=True)
class SequencesAborted:
    """The last outputs of sequences that were aborted one by one (the API's process has found a stop string in each). A
    whole request that is aborted gets none: nobody reads them."""

    outputs: list[SequenceOutput]


@dataclass(frozen=True, slots=True)
class Rejected:
    """The engine did not take the request on."""

    request_id: str
    error: TuckaError


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    call: int
    info: AdapterInfo


@dataclass(frozen=True, slots=True)
class AdapterRefused:
    """`missing`: the bytes of memory that the adapter lacks, where that is why."""

    call: int
    error: TuckaError
    missing: int = 0


FromEngine = Started | NotStarted | StepDone | Idle | SequencesAborted | Rejected | AdapterLoaded | AdapterRefused


@dataclass(frozen=True, slots=True)
class StartReader:
    """The first message to a new reader: what the adapters are checked against."""

    base: BaseLayout
    log_format: str


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """Is answered by `AdapterSize` where reading takes long, and then by `AdapterRead` or `AdapterUnread`.
    `folder` and `blob` are a load's; an adapter whose tensors take more than `room` bytes is not read."""

    folder: Path
    blob: str | None
    room: int


ToReader = StartReader | ReadAdapter


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """So many bytes are being read."""

    bytes: int


@dataclass(frozen=True, slots=True)
class TensorRun:
    """Tensors of one type that lie one behind the other, from `offset` on."""

    offset: int
    dtype: str
    shapes: tuple[tuple[int, ...], ...]


TensorNumber = int
"""A tensor's place among those of all runs."""


@dataclass(frozen=True, slots=True)
class AdapterRead:
    """A format.Adapter (handover.py) whose tensors lie in the file that comes with the message. `modules` have the
    fields of theirs in order: tensors by number, and what else is a float."""

    kind: str
    config: dict[str, Any]
    digest: str
    modules: dict[str, tuple[TensorNumber | float | None, ...]]
    router: str | None
    ec: TensorNumber | None
    saved: dict[str, TensorNumber]
    training: dict[str, Any] | None
    tokens: dict[str, tuple[TensorNumber, TensorNumber]]
    runs: list[TensorRun]
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True)
class AdapterUnread:
    """`missing`: as in `AdapterRefused`."""

    error: TuckaError
    missing: int = 0


FromReader = AdapterSize | AdapterRead | AdapterUnread
