"""Eight CPU devices for every test; must be set before JAX starts. Ctrl-C is heard, also where tests run behind `&`."""

import os
import signal

from tests import compilation

os.environ.update(compilation.variables(devices=8))

# A shell's job in the background ignores it, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
