"""Pages that need nothing else: templates of this package, and the libraries that fill them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from horizon.errors import ConfigError

TEMPLATES = Path(__file__).parent / "templates"


def require_report_extra() -> None:
    """Raise a ConfigError where a report cannot be drawn or written."""
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"a report needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'horizon[report]'"
        )


def render(template: str, **values: Any) -> str:
    """A template of this package; values are escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(**values)
