import os
import subprocess
import sys
import textwrap

import pytest

from relaxlm.errors import ConfigError
from relaxlm.runtime.threads import VARIABLE, set_threads, usable_cores


def test_there_is_at_least_one_core_and_no_more_than_processors() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_less_than_one_thread_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^threads = 0, expected 1 or more$"):
        set_threads(0)


def test_the_pool_has_as_many_threads_as_asked_for() -> None:
    code = """
        import os, tvm_ffi
        from relaxlm.runtime.threads import VARIABLE, set_threads, usable_cores
        def threads(count):
            set_threads(count)
            return tvm_ffi.get_global_func("runtime.NumThreads")()
        os.environ.pop(VARIABLE, None)
        set_threads()
        assert os.environ[VARIABLE] == str(usable_cores())
        print([threads(3), threads(2), threads(1), threads(3), threads(4)])
        """
    environment = {**os.environ, VARIABLE: "3"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
    )
    # The pool is made with three; it cannot grow.
    assert done.stdout == "[3, 2, 1, 3, 3]\n", done.stderr
