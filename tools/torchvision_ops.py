"""Installed as sitecustomize.py of an environment whose torchvision cannot find its own ops.

The package index may carry torchvision only as a CUDA build. Beside a CPU build of torch it
fails on import with "operator torchvision::nms does not exist", and transformers with it.
Nothing here runs those two ops, but their schemas have to exist before torchvision is
imported. `make env-vllm` installs this file only where the import was seen to fail.
"""

import sys
from importlib.abc import MetaPathFinder

_libraries = []


class _DefineOpsFirst(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)  # an unreferenced library takes its ops with it
        return None


sys.meta_path.insert(0, _DefineOpsFirst())
