"""Prints the requirements of an extra of pyproject.toml, a line each: `pip install $(python packaging/extra.py dev)`.

`dependencies` names the package's own. So they can be installed without the package, whose installation compiles.
"""

import re
import sys
from pathlib import Path

text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
found = re.search(rf"^{re.escape(sys.argv[1])} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
if not found:
    raise SystemExit(f"error: pyproject.toml has no extra {sys.argv[1]!r}")
print("\n".join(re.findall(r'"([^"]+)"', found[1])))
