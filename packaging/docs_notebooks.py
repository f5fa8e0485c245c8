"""Hook of mkdocs: a page of the comment `<!-- notebook: path -->` shows that notebook, with the outputs in it."""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from notebook import as_markdown  # noqa: E402

NOTEBOOK = re.compile(r"<!-- notebook: (\S+) -->")


def on_page_markdown(markdown: str, page, config, files) -> str:
    def shown(match: re.Match) -> str:
        return as_markdown(json.loads(Path(match[1]).read_text(encoding="utf-8")))

    return NOTEBOOK.sub(shown, markdown)
