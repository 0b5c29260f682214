"""Embeddings: a prompt's final hidden states as one vector, over as many chunks as the prompt is cut into."""

from torch import Tensor, float32
from torch.nn.functional import normalize

from tucka_runtime.engine.batch import Batch
from tucka_runtime.engine.sequence import Sequence
from tucka_runtime.messages import Pooling


class Pooler:
    """Sums what will be averaged, in fp32 on the device, until its prompt ends. Prompts that are averaged are computed
    from their first token on, whatever the cache has: `scheduler.cache_namespace` sees to it."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], Tensor] = {}

    def pool(self, batch: Batch, hidden: Tensor) -> dict[int, Tensor]:
        """The embeddings (d,), fp32 of length 1 and on their way to the host, of the prompts that end in this batch, by
        chunk. `hidden` (T, d) are the batch's final hidden states."""
        found = {}
        for i, (chunk, first) in enumerate(zip(batch.chunks, batch.first_rows, strict=True)):
            seq, end = chunk.seq, first + chunk.count
            if seq.request.pooling is None or seq.routing:
                continue
            vector = hidden[end - 1].float()
            if seq.request.pooling is Pooling.MEAN:
                vector = hidden[first:end].sum(dim=0, dtype=float32)  # of as many: the length falls out below
                if chunk.start:
                    vector += self.sums[seq.key]
                self.sums[seq.key] = vector
            if chunk.last:
                self.forget(seq)
                found[i] = normalize(vector, dim=0).to("cpu", non_blocking=True, copy=True)
        return found

    def forget(self, seq: Sequence) -> None:
        """Drops what is kept of a sequence between steps."""
        self.sums.pop(seq.key, None)
