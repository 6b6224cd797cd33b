"""The pages' templates: jinja2, with their style inside, so that a page is one file."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape

from conf.sizes import size

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(),
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["size"] = size
TEMPLATES.filters["formula"] = lambda text: text.replace("**2", "²").replace("*", " ")
