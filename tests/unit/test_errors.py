"""What a user is told of an error that is not one of ours."""

from __future__ import annotations

import errno
import os

import pytest

from dude_cli.errors import ResourceError, explained, memory_errors


@pytest.mark.parametrize(
    "number", [errno.EROFS, errno.ENOENT, errno.EIO, errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP]
)
@pytest.mark.parametrize("path", ["/proc/x", b"/proc/x"])
def test_a_path_that_cannot_be_used_is_a_usage_error(number, path):
    error = explained(OSError(number, os.strerror(number), path))
    assert error is not None
    assert error.exit_code == 2
    assert error.where == "/proc/x"
    assert os.strerror(number) in str(error)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_lack_of_resources_with_or_without_a_path(number):
    for path in ("/x", None):
        error = explained(OSError(number, os.strerror(number), path))
        assert error is not None
        assert error.exit_code == 5
        assert error.where == path


def test_an_error_without_a_path_stays_unexplained():
    assert explained(OSError(errno.EIO, "Input/output error")) is None
    assert explained(KeyError("x")) is None


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_says_what_to_do(error):
    with pytest.raises(ResourceError) as caught, memory_errors("out of memory", where="x", fix="half of it"):
        raise error
    assert caught.value.fix == "half of it"
    with pytest.raises(KeyError), memory_errors("out of memory", where="x", fix="half of it"):
        raise KeyError("other")
