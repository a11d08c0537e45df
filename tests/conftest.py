import os
import tempfile

# As the command line does: on a busy machine, spinning threads make the tests several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What is remembered of engines and downloaded belongs to the tests alone.
_cache = tempfile.TemporaryDirectory(prefix="tlpipe-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name
