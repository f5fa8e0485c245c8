"""Runs a notebook's cells, as Jupyter would, and writes what they print and draw: no Jupyter needed.

    python packaging/notebook.py examples/quickstart.ipynb

`run` is what a test calls; `as_markdown` what the documentation shows.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import linecache
import sys
from pathlib import Path


def run(notebook: dict, folder: str) -> list[list[dict]]:
    """The outputs of each code cell, run in order in one namespace; errors are raised. `folder`: where they run."""
    namespace, outputs = {"__name__": "__main__"}, []
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                text = io.StringIO()
                with contextlib.redirect_stdout(text):
                    exec(_compiled("".join(cell["source"]), len(outputs)), namespace)
                outputs.append(_outputs(text.getvalue()))
    return outputs


def _compiled(source: str, number: int):
    """Code whose lines `inspect` finds, as it does in Jupyter."""
    name = f"<cell {number}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    return compile(source, name, "exec")


def _outputs(text: str) -> list[dict]:
    made = [{"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}] if text else []
    plots = sys.modules.get("matplotlib.pyplot")
    for number in plots.get_fignums() if plots else ():
        plots.figure(number).savefig(picture := io.BytesIO(), dpi=80, bbox_inches="tight")
        data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}
        made.append({"output_type": "display_data", "data": data, "metadata": {}})
        plots.close(number)
    return made


def as_markdown(notebook: dict) -> str:
    """Cells and their outputs as a page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output.get("data", {}):
                parts.append(f"![output of the cell above](data:image/png;base64,{output['data']['image/png']})")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    import tempfile

    path = Path(sys.argv[1])
    notebook = json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        results = run(notebook, folder)
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(codes, results, strict=True), 1):
        cell["outputs"], cell["execution_count"] = outputs, number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
