"""The ops: one folder each, with a plain reference, the implementations that are fast, and one dispatcher.

`registry` knows which implementation each op would use here and why (`diffmem info` prints it).
"""
