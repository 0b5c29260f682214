"""Stop strings, matched while text streams in (Knuth-Morris-Pratt: constant work per character and stop)."""

StopTable = tuple[tuple[str, tuple[int, ...]], ...]


def stop_table(stops: tuple[str, ...]) -> StopTable:
    """Each stop with its failure function: for every prefix, the longest proper prefix that is also its suffix."""
    return tuple((stop, _failure(stop)) for stop in stops)


class StopStrings:
    """The state of one sequence. The stop that is complete first wins; of several ending at once, the longest."""

    def __init__(self, table: StopTable):
        self._table = table
        self._matched = [0] * len(table)

    @property
    def held(self) -> int:
        """Characters at the end of the text so far that may be the beginning of a stop."""
        return max(self._matched, default=0)

    def feed(self, text: str, counts: bool = True) -> tuple[int, str] | None:
        """The first stop completed within `text`, with the number of its characters up to the stop's end.

        Where `text` does not count, no stop is completed in it, but one may begin.
        """
        if not self._table:
            return None
        for position, char in enumerate(text, 1):
            found = ""
            for i, (stop, failure) in enumerate(self._table):
                matched = self._matched[i]
                while matched and stop[matched] != char:
                    matched = failure[matched - 1]
                matched += stop[matched] == char
                if matched == len(stop):
                    found = max(found, stop, key=len)
                    matched = failure[matched - 1]
                self._matched[i] = matched
            if found and counts:
                return position, found
        return None


def _failure(stop: str) -> tuple[int, ...]:
    table = [0] * len(stop)
    matched = 0
    for i in range(1, len(stop)):
        while matched and stop[i] != stop[matched]:
            matched = table[matched - 1]
        matched += stop[i] == stop[matched]
        table[i] = matched
    return tuple(table)
