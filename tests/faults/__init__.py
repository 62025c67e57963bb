"""Trainings under SIGKILL: `harness` runs one, `trainer` is what it kills and starts again, `inject` kills at chosen points."""

import pytest

pytest.register_assert_rewrite("tests.faults.harness")
