"""Settings of the whole suite: strict dtype promotion, and programs compiled quickly rather than well."""

import os
import signal
from pathlib import Path

# A shell's background job has Ctrl-C ignored, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # parity is stated in float32 as a CPU computes it
# Nearly all of the suite's time is the compilation of programs that run once: LLVM's optimisations, and the fusion
# emitters, which take twice as long as the emitters before them.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # every run tests what it compiled itself

import jax
import pytest

E2E = Path(__file__).parent / "e2e"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)  # for tests of meshes; the others run on the first


@pytest.hookimpl(tryfirst=True)  # before -m deselects by the markers added here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What lies in tests/e2e is `e2e`; `slow` tests run only where the expression of -m names the marker.

    The second is not `addopts = "-m 'not slow'"`, because -m "not e2e" on the command line would replace it.
    """
    for item in items:
        if E2E in item.path.parents:
            item.add_marker(pytest.mark.e2e)
    if "slow" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Programs of earlier modules are let go: each maps memory, and a process may have only so many maps."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests of what surrounds the programs: half the compile time is worth slower ones."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def compile_cache_allowed(tmp_path, monkeypatch):
    """JAX's compilation cache may be turned on, as in a user's process; returns the folder of our caches."""
    update, before = jax.config.update, jax.config.values["jax_enable_compilation_cache"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    update("jax_enable_compilation_cache", True)
    yield tmp_path / "cache" / "domino-jax"
    update("jax_enable_compilation_cache", before)
