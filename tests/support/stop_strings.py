"""Stop strings by their definition."""


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The definition: the stop that ends first; of several ending at once, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None
