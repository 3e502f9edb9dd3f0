"""The modules that StyleGAN2's and StyleGAN3's code takes from `torch_utils.ops`: docs/migrating-stylegan-ops.md.

There `bias_act` and `upfirdn2d` are modules with a function of the same name. In `fastgan.ops` the names are the functions'.
"""

import importlib

bias_act = importlib.import_module("fastgan.ops.bias_act")
upfirdn2d = importlib.import_module("fastgan.ops.upfirdn2d")
