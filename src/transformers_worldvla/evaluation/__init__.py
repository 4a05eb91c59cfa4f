"""Measures a model on recorded and simulated episodes.

`metrics` holds the formulas, `open_loop` compares predictions with a recording, `pictures` draws what was found.
"""
