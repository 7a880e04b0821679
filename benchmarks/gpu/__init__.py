"""The first minutes on a GPU: `make gpu`, or `python -m benchmarks.gpu`, needs nothing installed and no network.

It builds the compiled core for the GPU that is there, checks every kernel, and measures, in stages (see
`benchmarks.gpu.runner`). Each is a process of its own with a time limit of its own, and its results lie in the folder
`--out` as soon as they exist; what fails or does not fit is named, and the next stage goes on.

    make gpu OUT=results                 # everything, 480 s
    make gpu OUT=results BUDGET=240      # what fits into 240 s; the rest is named
    make gpu INTERPRET=1                 # a dry run of every stage's lines on the CPU, tiny sizes, no speeds
    python -m benchmarks.gpu --only search                 # this stage alone (and the build and the ceilings it needs)
    python -m benchmarks.gpu --adopt results               # put them into benchmarks/results under the card's name

The dry run runs Triton kernels in its interpreter, CUDA kernels compiled for the host stand-in (csrc/simt), and
torch.compile with a backend that compiles nothing.
"""
