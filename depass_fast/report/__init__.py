"""Reports: what a result says as one HTML file that needs nothing else (docs/report.md).

This room knows no model and no result: it takes labels and scores, and makes a page of them.
"""
