"""Errors in the form of OpenAI's API."""

INVALID = "invalid_point_cloud"  # code of errors about a cloud


class ApiError(Exception):
    """A request that fails.

    Args:
        status: of HTTP.
        message: what is wrong, what was got and what is expected.
        param: the argument at fault, such as `messages[0].content`.
        code: for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict:
        """The JSON that OpenAI's clients read."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
