"""What methods are made of: the loaded model, DDIM, guidance, injection sites, reading and injecting features."""

import os

# Both are read when the libraries are imported. The first keeps a line about torchvision, which nothing here uses, out of
# everybody's terminal; the second keeps code that lies in a model repository from ever being run.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
