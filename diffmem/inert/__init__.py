"""Files from elsewhere, read without executing anything and without believing their claims.

`boundary`: whatever goes wrong in a parser becomes one line that names the file. `documents`: JSON. `pickles`: an
interpreter of pickle's opcodes that can build plain values only. `torch_files`: what `torch.save` writes. `archives`:
zip directories and tar members, with limits.
"""
