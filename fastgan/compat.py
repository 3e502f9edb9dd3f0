"""The modules that StyleGAN2's and StyleGAN3's code takes from `torch_utils.ops`: docs/migrating-stylegan-ops.md.

There `upfirdn2d` is a module with a function of the same name. In `fastgan.ops` the name is the function's.
"""

import importlib

upfirdn2d = importlib.import_module("fastgan.ops.upfirdn2d")
