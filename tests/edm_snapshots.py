"""Snapshots in the layout EDM writes, small, made without EDM's code."""

from __future__ import annotations

import sys
import types

import numpy as np
import torch


def pretended_edm_modules(monkeypatch, marker):
    """EDM's modules as far as pickles name them: classes whose instances are stored as persistent objects, with
    source code that would create `marker`."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    class EasyDict(dict):
        pass

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("Python's own unpickler ran")

    for module, member in ((util, EasyDict), (persistence, _reconstruct_persistent_obj)):
        member.__module__, member.__qualname__ = module.__name__, member.__name__
        setattr(module, member.__name__, member)
    for name, module in (
        ("torch_utils", types.ModuleType("torch_utils")),
        ("dnnlib", types.ModuleType("dnnlib")),
        ("torch_utils.persistence", persistence),
        ("dnnlib.util", util),
    ):
        monkeypatch.setitem(sys.modules, name, module)

    class Persistent(torch.nn.Module):
        def __init__(self, class_name, *args, **kwargs):
            super().__init__()
            self.class_name, self._init_args, self._init_kwargs = class_name, args, EasyDict(kwargs)

        def __reduce__(self):
            source = f"open({str(marker)!r}, 'w')\nimport os\nos._exit(1)\n"
            meta = EasyDict(
                type="class", version=6, module_src=source, class_name=self.class_name, state=dict(self.__dict__)
            )
            return _reconstruct_persistent_obj, (meta,)

    return types.SimpleNamespace(EasyDict=EasyDict, Persistent=Persistent)


def network(edm, precond, kwargs, tensors):
    """The module tree EDM's classes would have, from a state dict."""
    root = edm.Persistent(precond, **kwargs)
    root.sigma_min, root.img_resolution, root.label_dim = (
        np.float64(0.002),
        kwargs["img_resolution"],
        kwargs["label_dim"],
    )
    for path, tensor in tensors.items():
        module, *names, last = root, *_split(path)
        for name in names:
            if name not in module._modules:
                child = torch.nn.ModuleDict() if name in ("enc", "dec") else edm.Persistent("UNetBlock", 3, dropout=0.1)
                child.skip_scale = np.sqrt(0.5)
                module.add_module(name, child)
            module = module._modules[name]
        if last in ("resample_filter", "freqs"):
            module.register_buffer(last, tensor)
        else:
            module.register_parameter(last, torch.nn.Parameter(tensor))
        module.register_parameter("absent", None)
    return root


def _split(path):
    return path.split(".")


def snapshot(edm, net):
    return {
        "ema": net,
        "loss_fn": edm.Persistent("VPLoss", beta_d=19.9),
        "augment_pipe": None,
        "dataset_kwargs": edm.EasyDict(path="cifar10.zip", use_labels=False, size=np.int64(1000), skip={1, 2}),
    }
