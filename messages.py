"""Words for people: an error in one line."""


def one_line(error: Exception) -> str:
    """The message of an error on one line; an unexpected error is preceded by its class."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {message}"
    is_expected = message and isinstance(error, (OSError, ValueError, ImportError))
    return " ".join((message if is_expected else f"{type(error).__name__}: {message}").split())
