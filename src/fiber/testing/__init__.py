"""For tests of what extends Fiber; needs pytest, and is imported by nothing of Fiber itself.

`BackendConformance` is what every backend passes, Fiber's own and those of others. A test module
derives a class from it and says how the backend is made:

    import pytest
    from fiber.testing import BackendConformance
    from example import ExampleBackend

    class TestExample(BackendConformance):
        @pytest.fixture
        def backend(self):
            backend = ExampleBackend()
            yield backend
            backend.close()

It uses the protocol (`fiber.backends.base`) and nothing else, on jobs that need Python and nothing
else.
"""

from fiber.testing.backends import BackendConformance

__all__ = ["BackendConformance"]
