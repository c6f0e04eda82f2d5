"""Predicting what inference costs from a profile: pure functions, no clock, no files, no hardware.

Rooms: ``roofline`` (the law of one kernel), ``roofs`` (the measured ceilings), ``laws`` (what is fitted), ``solve``
(robust least squares), ``fit`` (the parameters from samples, and their errors), ``kernel_model`` (what a call costs),
``stored`` (fits as a profile keeps them), ``experts`` and ``speculation`` (what a step has to touch and what it
yields), ``transformer`` (a model as kernel calls), ``economics`` (dollars).
"""
