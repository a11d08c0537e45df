import os

# As the command line does: on a busy machine, spinning threads make the tests several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
