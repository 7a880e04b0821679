"""`pytest -p pretended_gpu …`: PyTorch says that there is a GPU, where there is none, so that whatever would pick one
fails. What passes asks for the CPU."""

import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda device=None: "a GPU that is not there"
