"""What methods are made of: the loaded model, DDIM, guidance, injection sites, reading and injecting features."""

import os

# All are read when the libraries are loaded. The first keeps a line about torchvision, which nothing here uses, out of
# everybody's terminal; the second keeps code that lies in a model repository from ever being run. The other two let idle
# threads spin briefly and then sleep: spinning on halves the speed where others use the cores too (benchmarks/rows.py).
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
