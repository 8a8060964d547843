"""What methods are made of: the loaded model, DDIM, guidance, injection sites, reading and injecting features."""

import ctypes
import os
import platform

# All are read when the libraries are loaded. The first keeps a line about torchvision, which nothing here uses, out of
# everybody's terminal; the second keeps code that lies in a model repository from ever being run. The other two let idle
# threads spin briefly and then sleep: spinning on halves the speed where others use the cores too (benchmarks/rows.py).
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# What one pass frees, the next one needs: by itself glibc hands large blocks back to the system and takes zeroed pages anew
# (benchmarks/rows.py). Old versions of it allow 32 MB at most. Whoever sets one of its own variables decides for himself.
if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
    _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
    _mallopt = ctypes.CDLL(None).mallopt
    _mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    _ = _mallopt(_M_MMAP_THRESHOLD, 1 << 30) or _mallopt(_M_MMAP_THRESHOLD, 1 << 25)
