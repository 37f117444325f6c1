"""HTML files about interventions: what one edits and does, `report`, and several side by side, `comparison`."""

from reftlens.reports.comparing import comparison

__all__ = ["comparison"]
