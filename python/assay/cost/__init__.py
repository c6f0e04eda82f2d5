"""Predicting what inference costs from a profile: pure functions, no clock, no files, no hardware.

Rooms: ``roofline`` (the law of one kernel), ``fit`` (its parameters from samples), ``experts`` and ``speculation``
(what a step has to touch and what it yields), ``transformer`` (a model as kernel calls), ``economics`` (dollars).
"""
