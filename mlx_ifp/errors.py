"""The one exception users meet."""


class IFPError(ValueError):
    """Something the user can mend; the message is one line that says how."""
