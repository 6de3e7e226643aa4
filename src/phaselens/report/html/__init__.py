"""A run as one HTML file: summary, tables, figures, heatmaps by head, texts by token, provenance.

The file holds its styles, its script and its data, and loads nothing. `page` fills the template; the other modules
prepare what it shows. Everything that comes from a model, a plugin or a text is escaped by Jinja2, or is text in JSON.
"""

from phaselens.report.html.environment import require_jinja
from phaselens.report.html.page import html_report, write_html_report

__all__ = ["html_report", "require_jinja", "write_html_report"]
