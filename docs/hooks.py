"""What `mkdocs` needs beyond Markdown: the notebooks lie beside `docs`, and names in code lead to their reference."""

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Any, config: Any) -> Any:
    """Add the notebooks, and the pages that lie at the root of the repository."""
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        files.append(File(f"notebooks/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    for uri, path in {"changelog.md": ROOT / "CHANGELOG.md", "data.md": ROOT / "data" / "README.md"}.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of `docs`, which are right where the repository is read, to where these pages are on the site."""
    markdown = re.sub(
        r"\]\((\.\./)*\.\./notebooks/", lambda m: f"]({'../' * (len(m[1] or '') // 3)}notebooks/", markdown
    )
    return markdown.replace("](../data/README.md)", "](data.md)")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """`rl.fit` in a text leads to the reference of `fit`, where there is one; a notebook loads nothing from outside."""
    if page.file.src_uri.endswith(".ipynb"):
        return re.sub(
            r"<script\b(?:(?!</script>).)*?https://(?:cdnjs|unpkg)(?:(?!</script>).)*?</script>", "", html, flags=re.S
        )
    name = r"(?<!\">)<code>rl\.([A-Za-z_][\w.]*)((?:\([^<]*\))?)</code>(?!</a>)"
    return re.sub(name, r'<autoref identifier="reftlens.\1" optional><code>rl.\1\2</code></autoref>', html)
