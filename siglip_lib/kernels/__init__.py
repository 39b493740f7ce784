"""Kernels in Triton. Importing this imports none of them: each is imported where it is used.

Without a GPU it turns on Triton's interpreter, which runs a kernel with NumPy, slowly. Triton looks for that once, when
it is imported: so this has to come first.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
