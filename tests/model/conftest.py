"""Every class of CPU that this machine can run, as in the op tests."""

from tests.ops.conftest import cpu_class, pytest_generate_tests  # noqa: F401
