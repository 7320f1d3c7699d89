"""The four models' mixers and the baselines': a file each. A new file here is found by itself."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
