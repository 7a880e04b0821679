"""The demonstration: the whole way from real images to a verdict, on a network that copies and one that does not."""

from diffmem.demo.run import Demo, Model, run_demo

__all__ = ["Demo", "Model", "run_demo"]
