"""Hook of mkdocs: links that leave docs/ name the file instead, and README's links, shown at the front, lose `docs/`.

The same pages are read in a checkout, where links to the code lead somewhere, and on the site, where they would not.
"""

import re

COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+)([^)#]+)(#[^)]*)?\)")
FROM_THE_ROOT = re.compile(r"\]\((?!https?:)(?!#)([^)]+)\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    if page.file.src_uri == "index.md":
        text = open("README.md").read()
        return FROM_THE_ROOT.sub(_from_the_root, COMMENT.sub("", text))
    depth = page.file.src_uri.count("/")
    return LINK.sub(lambda match: _leaving(match, depth), COMMENT.sub("", markdown))


def _from_the_root(match: re.Match) -> str:
    path = match[1]
    return f"]({path.removeprefix('docs/')})" if path.startswith("docs/") else f"](index.md '{path} in the checkout')"


def _leaving(match: re.Match, depth: int) -> str:
    text, up, path, _ = match.groups()
    if up.count("/") <= depth:
        return match[0]
    return text if path in text else f"{text} (`{path}`)"
