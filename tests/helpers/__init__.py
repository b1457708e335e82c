"""Small modules and tensors that the tests of several packages share."""
