"""Measures a model on recorded and simulated episodes.

`metrics` and `perceptual` hold the formulas, `open_loop` and `world_model` compare predictions with recordings,
`closed_loop` acts in LIBERO (`libero_*`) or any gymnasium environment (`gym_env`), `results` keeps the rows and sums
them up, `pictures` and `videos` draw what was found.
"""
