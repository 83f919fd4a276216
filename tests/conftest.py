"""Every test runs offline and on two threads, whatever the machine offers."""

import os

# Both are read once, when transformers and torch are first imported: so before anything imports
# them. On a busy machine, threads that spin while they wait make tiny models 20 times slower.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch

torch.set_num_threads(2)

if not torch.cuda.is_available():
    # Read when Triton is first imported: kernels run on the CPU, slowly, program after program.
    os.environ["TRITON_INTERPRET"] = "1"
