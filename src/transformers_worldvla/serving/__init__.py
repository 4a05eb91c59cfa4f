"""Acting: the stateful policy and the server that offers it to robots and simulators.

The other end is the package `worldvla_client`, which runs where there is no torch.
"""
