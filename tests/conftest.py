"""Eight CPU devices for every test; must be set before JAX starts."""

import os

from tests import compilation

os.environ.update(compilation.variables(devices=8))
