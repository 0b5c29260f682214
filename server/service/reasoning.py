"""What a model thinks before it answers, told apart from the answer: `<think>` ... `</think>`.

Templates of models that always think write the opening tag into the prompt; then the answer begins with the thought.
"""

from tucka_runtime.conversations import CLOSE, OPEN
from tucka_runtime.server.service.events import OutputParser, Reasoning, ReasoningEnded
from tucka_runtime.server.service.parsing import Step, StreamParser


def thinks(template: str) -> bool:
    """Whether a chat template is of a model that thinks: it tells thoughts of earlier turns apart."""
    return CLOSE in template


class ThinkParser(StreamParser):
    """A thought, if the answer begins with one, and then what `inner` makes of the rest. Blanks around the thought
    belong to neither. `begun`: the prompt has opened it."""

    def __init__(self, inner: OutputParser, begun: bool):
        self.marks = (OPEN, CLOSE, *inner.marks)
        self._inner = inner
        self._begun = begun
        super().__init__()

    def run(self) -> Step[None]:
        start = yield from self.skip_blanks(0)
        tagged = yield from self.starts(OPEN, start)
        if tagged or self._begun:
            self.take(start + (len(OPEN) if tagged else 0))
            yield from self._thought()
        while True:
            self.events += self._inner.push(self.take(len(self.text)))
            if self.closed:
                self.events += self._inner.finish()
                return
            yield

    def _thought(self) -> Step[None]:
        self.take((yield from self.skip_blanks(0)))
        while (end := self.text.find(CLOSE)) < 0:
            self._think(self.before(CLOSE))
            if self.closed:
                self.text = ""
                return
            yield
        self._think(end)
        self.take(len(self.text) - len(self.text.lstrip()) + len(CLOSE))
        self.events.append(ReasoningEnded())
        self.take((yield from self.skip_blanks(0)))

    def _think(self, count: int) -> None:
        """Gives that many characters out but for blanks at their end, which may be the thought's."""
        if said := self.text[:count].rstrip():
            self.take(len(said))
            self.events.append(Reasoning(said))
