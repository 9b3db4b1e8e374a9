"""How good a model is: bits per byte and samples during training; more to come beside them."""
