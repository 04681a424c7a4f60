"""Every error Shoal raises on purpose, and who must act on it.

ShoalError
├── CallerError                 the request is wrong: change it               400
│   ├── InvalidRequest          a parameter is malformed or out of range      400
│   ├── ContextTooLong          prompt and answer do not fit the context      400
│   ├── UnknownModel            no such model here                            404
│   └── UnsupportedByModel      this model cannot do that                     400
├── RetryError                  nothing is wrong with the request: try again
│   ├── QueueFull               too much is waiting                           429
│   ├── EngineStopped           the engine is stopping or has failed          503
│   └── PeerLost                a worker or a connection to it broke off      503
├── OperatorError               whoever runs the server must act              500
│   ├── ConfigError             an option or a file of settings is wrong      500
│   ├── SourceError             a model name, file or download is unusable    500
│   │   ├── DownloadError       bytes did not arrive, or not the right ones   500
│   │   └── UnsupportedModel    the file is fine, Shoal cannot run it         500
│   ├── OutOfMemory             the model or its cache does not fit           500
│   ├── PlacementError          the nodes cannot hold or run the model        500
│   └── PeerRefused             not of this cluster: certificate, token …     500
│       └── FrameError          bytes that break the wire format              500
└── InternalError               our bug                                       500
"""

from __future__ import annotations


class ShoalError(Exception):
    """Base of every deliberate error; `status` is the HTTP status it maps to."""

    status = 500

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        """`param` names the offending parameter, `code` is a stable machine-readable word."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class CallerError(ShoalError):
    status = 400


class InvalidRequest(CallerError):
    pass


class ContextTooLong(CallerError):
    pass


class UnknownModel(CallerError):
    status = 404


class UnsupportedByModel(CallerError):
    pass


class RetryError(ShoalError):
    status = 503

    def __init__(
        self, message: str, *, retry_after_s: float = 1.0, code: str | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class QueueFull(RetryError):
    status = 429


class EngineStopped(RetryError):
    status = 503


class PeerLost(RetryError):
    """`noticed_by` says how it came to light: see `engine.api.Incident`."""

    status = 503
    noticed_by = "connection"


class OperatorError(ShoalError):
    pass


class ConfigError(OperatorError):
    pass


class SourceError(OperatorError):
    pass


class DownloadError(SourceError):
    pass


class UnsupportedModel(SourceError):
    pass


class OutOfMemory(OperatorError):
    pass


class PlacementError(OperatorError):
    pass


class PeerRefused(OperatorError):
    pass


class FrameError(PeerRefused):
    pass


class InternalError(ShoalError):
    pass
