"""The page that shows what the regularization did: one HTML file without scripts, network or other files."""

from __future__ import annotations

from goodfit.report.render import render as render

__all__ = ["render"]
