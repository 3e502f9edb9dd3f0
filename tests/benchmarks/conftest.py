import sys
from pathlib import Path

# After the installed package: the benchmarks are only in the checkout.
sys.path.append(str(Path(__file__).parents[2]))
