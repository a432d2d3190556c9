"""The one error a user sees: where, what was found, what was expected, what to do."""


class PosttrainError(Exception):
    """A fault in the user's input or machine, told in four parts.

    place: the file and key, row or folder at fault; found: what is there; expected: what should be there;
    do: the next thing to try. Raised before a model is loaded wherever the fault can be seen that early.
    """

    def __init__(self, place: str, found: str, expected: str = "", do: str = ""):
        self.place, self.found, self.expected, self.do = place, found, expected, do
        parts = [f"{place}: {found.rstrip('.')}."]
        if expected:
            parts.append(f"Expected {expected.rstrip('.')}.")
        if do:
            parts.append(do if do.endswith((".", "?", "!", "`")) else f"{do}.")
        super().__init__(" ".join(parts))

    def __reduce__(self):
        return type(self), (self.place, self.found, self.expected, self.do)
