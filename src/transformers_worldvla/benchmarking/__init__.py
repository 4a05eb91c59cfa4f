"""What `worldvla bench` measures: arms that decode the same prompts in different ways, interleaved on one machine."""
