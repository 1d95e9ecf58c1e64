"""One exception tree.

Bad input is a `ValueError` too, so that callers who know nothing of Manta can catch it. Every
class takes positional arguments and hands all of them to `super().__init__`, because exceptions
cross process borders by pickling their `args`.
"""


class MantaError(Exception):
    """Base of every error that Manta raises on purpose."""


class ConfigError(MantaError, ValueError):
    """A configuration is wrong: unknown key, bad value, contradiction."""


class DataError(MantaError, ValueError):
    """Input data is wrong: missing file or column, wrong dtype, empty data set."""


class StorageError(MantaError, ValueError):
    """Files of rows are missing, incomplete or damaged, or cannot be written."""


class ExportError(StorageError):
    """An export folder is missing, incomplete or damaged, or cannot be written."""


class SnapshotError(StorageError):
    """A training snapshot is missing, incomplete or damaged, or cannot be written."""


class CheckpointError(MantaError, ValueError):
    """A TensorFlow checkpoint lacks something, holds something else, or cannot be written."""


class InputError(MantaError, ValueError):
    """A lookup request is wrong: unknown feature, bad shape, bad weights."""

    def __init__(self, message: str, feature: str | None = None) -> None:
        super().__init__(message, feature)
        self.message = message
        self.feature = feature

    def __str__(self) -> str:
        return self.message


class IdRangeError(InputError):
    """An id lies outside its table."""

    def __init__(self, feature: str, table: str, bad_id: int, num_rows: int) -> None:
        super().__init__(
            f"feature '{feature}': id {bad_id} is not in [0, {num_rows}) of table '{table}'",
            feature,
        )
        self.args = (feature, table, bad_id, num_rows)
        self.table = table
        self.bad_id = bad_id
        self.num_rows = num_rows


class ProtocolError(MantaError):
    """A shard was asked for something its state forbids: a gap in steps, a version gone by."""


class ShardNotReadyError(MantaError):
    """A shard has no state yet (it was just started or restarted) and refuses pulls and pushes."""


class ServerError(MantaError):
    """The lookup server answered with a problem; `status` is the HTTP status."""

    def __init__(self, status: int, title: str, detail: str) -> None:
        super().__init__(status, title, detail)
        self.status = status
        self.title = title
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.status} {self.title}: {self.detail}"


class ServerUnavailableError(MantaError):
    """No answer from the lookup server: connection refused or broken, or it took too long."""


class JobError(MantaError):
    """A training job cannot start or go on; the message says why."""


class ShardLostError(JobError):
    """The connection to a shard is gone: its process died, or it cut this worker off."""


class ReplayGapError(JobError):
    """A shard came back too far behind: it wants a push again that its worker has let go of."""


class JobAborted(JobError):  # noqa: N818
    """A worker was told to leave its steps: the driver will connect it anew, or has ended it."""
