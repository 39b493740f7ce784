"""Kernels in Triton. Importing this imports none of them: each is imported where it is used.

Without a GPU that Triton compiles for it turns on Triton's interpreter, which runs a kernel with NumPy, slowly. Triton
looks for that once, when it is imported: so this has to come first.
"""

import os

import torch

from siglip_lib.base import offers

if not any(map(offers.compiles_for, range(torch.cuda.device_count()))):
    os.environ.setdefault("TRITON_INTERPRET", "1")
