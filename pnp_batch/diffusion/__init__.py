"""What methods are made of: the loaded model, DDIM, guidance, injection sites, reading and injecting features."""

import os

# All are read when the libraries are loaded. The first keeps a line about torchvision, which nothing here uses, out of
# everybody's terminal; the second keeps code that lies in a model repository from ever being run. The third lets idle threads
# sleep instead of spin: on a machine that others use too, spinning made the built-in model ten times slower.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
