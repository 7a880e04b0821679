"""The cases of the sampler and of training, by name; those that Inductor compiles are compiled beforehand, side by
side, so that their stages find generated code in its cache. Imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.runner import Job

IMPLEMENTATIONS = ("diffmem", "PyTorch's")


@dataclass(frozen=True)
class Variant:
    """A network at work: batch, precision (see diffmem.precision), compiled or not; of training also whether as a CUDA
    graph, and which network."""

    stage: str
    batch: int
    precision: str
    compiled: bool
    graph: bool = False
    preset: str = "ddpmpp_cifar10"

    @property
    def name(self) -> str:
        how = "compiled" if self.compiled else "CUDA graph" if self.graph else "eager"
        return f"{self.stage} {self.preset} batch {self.batch} {self.precision} {how}"

    @property
    def gigabytes(self) -> float:
        """Of device memory, about: what all layers leave behind, and a context."""
        each = 0.016 if self.stage == "sampler" else 0.12
        return 1.5 + self.batch * each * (0.5 if self.precision == "bf16" else 1.0)


# The most telling first: what does not fit into the time is at the end.
SAMPLER = (
    Variant("sampler", 512, "bf16", True), Variant("sampler", 512, "tf32", True),
    Variant("sampler", 512, "ieee", False), Variant("sampler", 512, "bf16", False),
    Variant("sampler", 512, "tf32", False), Variant("sampler", 64, "bf16", True),
    Variant("sampler", 512, "ieee", True), Variant("sampler", 64, "bf16", False),
    Variant("sampler", 64, "ieee", False), Variant("sampler", 64, "tf32", False),
    Variant("sampler", 64, "tf32", True), Variant("sampler", 64, "ieee", True),
)  # fmt: skip
TRAINING = (
    Variant("training", 128, "bf16", True), Variant("training", 128, "tf32", False),
    Variant("training", 128, "bf16", False), Variant("training", 128, "ieee", False),
    Variant("training", 128, "ieee", False, preset="ddpmpp_8"),
    Variant("training", 128, "ieee", False, graph=True, preset="ddpmpp_8"),
    Variant("training", 128, "tf32", True), Variant("training", 64, "bf16", False, graph=True),
)  # fmt: skip
# Of a dry run, one of each kind; the interpreter's bfloat16 products are wrong.
DRY_SAMPLER = (Variant("sampler", 512, "tf32", True), Variant("sampler", 64, "ieee", False))
DRY_TRAINING = (
    Variant("training", 128, "tf32", True), Variant("training", 128, "ieee", False, graph=True, preset="ddpmpp_8"),
)  # fmt: skip
JOBS = tuple(
    Job(f"{variant.name}, {implementation}", variant.gigabytes)
    for variant in (*SAMPLER, *TRAINING)
    if variant.compiled
    for implementation in IMPLEMENTATIONS
)
DRY_JOBS = tuple(Job(f"{variant.name}, {IMPLEMENTATIONS[1]}", 1.0) for variant in (DRY_SAMPLER[0], DRY_TRAINING[0]))
