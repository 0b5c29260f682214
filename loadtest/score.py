"""Whether an answer is the expected one."""


def correct(text: str, expected: str, how: str) -> bool:
    """White space around either is not compared. `how`: exact, prefix (the answer begins with it) or contains."""
    text, expected = text.strip(), expected.strip()
    if how == "prefix":
        return text.startswith(expected)
    return expected in text if how == "contains" else text == expected
