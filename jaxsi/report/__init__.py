"""The report of runs as one HTML page, the model card, and the trackers: all read what a run directory holds."""
