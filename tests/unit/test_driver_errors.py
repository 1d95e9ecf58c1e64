"""What Ray says of a dead actor becomes one line that names the cause."""

from __future__ import annotations

import pytest
import ray

from ps.errors import JobError
from workers.job import unwrapped

CREATION = "The actor died because of an error raised in its creation task, ray::Shard (pid=1)"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{CREATION}\n  File x\nMemoryError: 8 EiB\n", f"{CREATION} MemoryError: 8 EiB"),
        ("The actor died unexpectedly.\n\tclass_name: Shard\n", "The actor died unexpectedly."),
        ("", "RayError"),
    ],
)
def test_the_line_says_why(text: str, line: str) -> None:
    with pytest.raises(JobError) as caught, unwrapped():
        raise ray.exceptions.RayError(text)
    assert str(caught.value) == line
