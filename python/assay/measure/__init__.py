"""Timing of the ops and of the roofs, and the calibration run that collects them into a profile."""
