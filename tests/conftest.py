"""Eight CPU devices for every test, and programs that are compiled once; must be set before JAX starts."""

import os
import tempfile

from tests import compilation

os.environ.update(compilation.variables(devices=8))

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # pytest-xdist's workers have it from their parent
    folder = tempfile.TemporaryDirectory(prefix="sret_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
